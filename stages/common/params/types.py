"""Numbers with limits, languages and kinds of private data, as the sections of `params.yaml` use them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

LANGUAGE_CODE = r"[a-z]{2,3}(-[A-Za-z0-9]+)*"  # ISO 639, with a region or a script
LanguageCode = Annotated[str, Field(pattern=f"^{LANGUAGE_CODE}$")]

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
