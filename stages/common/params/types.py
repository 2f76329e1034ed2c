"""Numbers with limits or `auto`, languages and kinds of private data, as `params.yaml` has them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator
from pydantic_core import PydanticCustomError

LANGUAGE_CODE = r"[a-z]{2,3}(-[A-Za-z0-9]+)*"  # ISO 639, with a region or a script
LanguageCode = Annotated[str, Field(pattern=f"^{LANGUAGE_CODE}$")]

# What every generator of random numbers takes; numpy's refuses others, in stages behind the training, too.
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]
OpenShare = Annotated[float, Field(gt=0.0, lt=1.0)]
Confidence = Annotated[float, Field(gt=0.5, lt=1.0)]  # of an interval
Resamples = Annotated[int, Field(ge=100)]  # of a bootstrap or a permutation test
Port = Annotated[int, Field(ge=1, le=65535)]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
# Keys of stages.common.privacy.personal_data.RECOGNISERS; a test compares them.
PrivateKind = Literal["email", "phone", "iban", "credit_card", "ipv4", "ssn", "secret"]

AUTO: Literal["auto"] = "auto"


def _check_auto_count(value: Any) -> Any:
    if value == AUTO or (type(value) is int and value >= 1):
        return value
    raise PydanticCustomError("auto_count", "must be auto or a whole number of at least 1")


# A number of rows that follows from the data (stages.common.statistics.sizes) unless it is given.
AutoCount = Annotated[int | Literal["auto"], PlainValidator(_check_auto_count)]
