"""The sections of `params.yaml` that the stages read."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import override

from stages.common.params.checked_yaml import Section, suggest_nearest
from stages.common.params.types import (
    AUTO,
    AutoCount,
    Confidence,
    Count,
    LanguageCode,
    OpenShare,
    Positive,
    PositiveCount,
    PrivateKind,
    Resamples,
    Seed,
    Share,
)


class FetchBase(Section):
    """Where the base model comes from."""

    origin: Literal["package", "hub", "folder"]
    name: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    file: str | None = None
    license: str | None = None

    @override
    def find_conflicts(self) -> Iterator[tuple[str, str]]:
        if self.origin == "package":
            for key in ("revision", "sha256", "file"):
                if getattr(self, key) is None:
                    yield key, "is null, but origin: package needs it (or set origin: hub, origin: folder)"
        else:
            for key in ("sha256", "file"):
                if getattr(self, key) is not None:
                    yield key, "is set, but only origin: package has one; set it to null"
        if self.origin == "folder" and self.revision is not None:
            yield "revision", "is set, but a folder has none; set it to null"


class HomeIntents(Section):
    """The packaged default: requests to a smart home, expanded from templates."""

    kind: Literal["home_intents"]
    version: str
    language: str = "en"
    rows_per_template: PositiveCount = 8
    min_rows_per_intent: Count = 40
    seed: Seed = 7
    reserved_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0


class HomeTools(Section):
    """The packaged conversations: requests to a smart home, calls of its tools, results and follow-ups."""

    kind: Literal["home_tools"]
    version: str
    rows_per_tool: PositiveCount = 120
    rows_per_pair: PositiveCount = 6
    rows_per_family: PositiveCount = 24
    seed: Seed = 7


class File(Section):
    """A file of the user's own rows."""

    kind: Literal["file"]
    path: str
    license: Annotated[str, Field(min_length=1)]
    origin: Literal["human", "template", "synthetic", "feedback"] = "human"
    format: Literal["jsonl", "json", "csv", "parquet"] | None = None
    encoding: str | None = None
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    records_key: str | None = None
    column_names: tuple[str, ...] = ()
    shape: Literal["chat", "sharegpt", "alpaca", "pair", "calls"] | None = None
    messages_column: str | None = None
    prompt_column: str | None = None
    context_column: str | None = None
    completion_column: str | None = None
    system_column: str | None = None
    tools_column: str | None = None
    rejected_column: str | None = None
    rating_column: str | None = None
    group_column: str | None = None
    tag_columns: tuple[str, ...] = ()


class Feedback(Section):
    """Feedback on answers, as rows to learn from."""

    kind: Literal["feedback"]
    path: str = "data/feedback/rows.jsonl"


Source = Annotated[HomeIntents | HomeTools | File | Feedback, Field(discriminator="kind")]


class Collect(Section):
    """What goes in."""

    on_bad_row: Literal["reject", "stop"] = "reject"
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]

    @override
    def find_conflicts(self) -> Iterator[tuple[str, str]]:
        for index, source in enumerate(self.sources):
            if isinstance(source, File | Feedback) and not _inside_data(source.path):
                yield (
                    f"sources.{index}.path",
                    "is outside data/, where DVC could not see it change; move it there",
                )


class Curate(Section):
    """Which rows are kept."""

    min_question_chars: Count = 1
    max_question_chars: PositiveCount
    max_answer_chars: PositiveCount
    max_same_characters: PositiveCount | None = None
    max_same_words: PositiveCount | None = None
    min_text_share: Share | None = None
    near_duplicate_threshold: Share | None
    on_conflicting_answers: Literal["drop", "keep"] = "drop"
    on_exact_duplicates: Literal["drop", "keep"] = "drop"
    normalize: tuple[Literal["nfc", "line_ends", "argument_order", "whole_numbers"], ...] = (
        "nfc",
        "line_ends",
        "argument_order",
        "whole_numbers",
    )
    personal_data: tuple[PrivateKind, ...] = ()

    @override
    def find_conflicts(self) -> Iterator[tuple[str, str]]:
        if self.min_question_chars > self.max_question_chars:
            yield (
                "min_question_chars",
                f"is above max_question_chars ({self.max_question_chars}): no row could pass",
            )


Severity = Literal["critical", "warning"]


class Severities(Section):
    """What a failed expectation does: critical stops the pipeline, a warning is recorded."""

    rows: Severity = "critical"
    ids: Severity = "critical"
    provenance: Severity = "critical"
    licenses: Severity = "critical"
    texts: Severity = "critical"
    answers: Severity = "critical"
    labels: Severity = "critical"


class Validate(Section):
    """What the curated rows must satisfy."""

    min_rows: AutoCount = AUTO
    max_rows: PositiveCount
    allowed_licenses: Annotated[tuple[str, ...], Field(min_length=1)]
    max_prompt_chars: PositiveCount
    max_answer_chars: PositiveCount
    min_labels: PositiveCount = 1
    max_labels: PositiveCount | None = None
    max_label_share: Share = 1.0
    severity: Severities = Severities()
    max_shown_rows: PositiveCount = 10
    expectations: tuple[dict[str, Any], ...] = ()

    @override
    def find_conflicts(self) -> Iterator[tuple[str, str]]:
        if self.min_rows != AUTO and self.min_rows > self.max_rows:
            yield "min_rows", f"is above max_rows ({self.max_rows}): no table could pass"
        if self.max_labels is not None and self.min_labels > self.max_labels:
            yield "min_labels", f"is above max_labels ({self.max_labels}): no table could pass"
        known = _expectation_types() if self.expectations else []
        for index, expectation in enumerate(self.expectations):
            kind = expectation.get("type")
            if known and kind not in known:
                yield (
                    f"expectations.{index}",
                    f"has no type that is an expectation{suggest_nearest(str(kind), known)}",
                )


class GroupLimits(Section):
    """What one group is held to; null measures and does not judge."""

    min_representation_ratio: Share | None
    max_cramers_v: Share | None


class CheckBias(Section):
    """How balanced the rows must be."""

    groups: Annotated[dict[str, GroupLimits], Field(min_length=1)]
    min_rows: PositiveCount
    alpha: OpenShare
    permutations: PositiveCount
    seed: Seed

    @override
    def find_conflicts(self) -> Iterator[tuple[str, str]]:
        tests = 2 * len(self.groups)  # of each group: the tie to the outcome, and to being dropped
        if tests / (self.permutations + 1) >= self.alpha:
            yield (
                "permutations",
                f"are too few: with {tests} tests corrected for their number, no p-value could fall below "
                f"alpha ({self.alpha}); {math.ceil(tests / self.alpha)} could",
            )


class Split(Section):
    """Which rows are learned, and which are asked."""

    validation_fraction: Share
    test_fraction: OpenShare
    max_test_rows_per_group: PositiveCount
    max_train_rows_per_group: PositiveCount | None = None
    max_train_rows: PositiveCount | None = None
    min_train_rows_per_label: Count = 0
    min_train_rows: AutoCount = AUTO
    min_test_rows: AutoCount = AUTO
    near_duplicate_threshold: Share
    seed: Seed

    @override
    def find_conflicts(self) -> Iterator[tuple[str, str]]:
        if self.validation_fraction + self.test_fraction >= 1.0:
            yield (
                "test_fraction",
                f"and validation_fraction ({self.validation_fraction}) leave nothing to train on",
            )


class Preflight(Section):
    """What is refused before anything costly runs."""

    on_refused_row: Literal["drop", "stop"] = "drop"
    shown_rows: PositiveCount = 3


class AskBase(Section):
    """Which test rows are asked, and how: the base model first, then the tuned one alike."""

    engine: Literal["auto", "paged", "transformers"]
    dtype: Literal["auto", "bfloat16", "float32"]
    max_rows: AutoCount | None = AUTO
    min_test_rows: AutoCount = AUTO
    batch_size: PositiveCount
    max_new_tokens: PositiveCount
    seed: Seed

    @override
    def find_conflicts(self) -> Iterator[tuple[str, str]]:
        most, least = self.max_rows, self.min_test_rows
        if isinstance(most, int) and isinstance(least, int) and most < least:
            yield "max_rows", f"is below min_test_rows ({least}): no test could pass"


class Export(Section):
    """In which form the tuned model leaves the pipeline."""

    gguf: bool
    quantization: Literal["f16", "bf16", "q8_0", "q4_0"]
    draft_rows: Count


class Evaluate(Section):
    """How base and tuned model are compared."""

    confidence: Confidence
    resamples: Resamples
    errors_shown: PositiveCount
    min_preference_pairs: PositiveCount
    simulator: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")] | None
    simulated_conversations: PositiveCount
    simulated_minutes: Positive
    seed: Seed


class ModelCard(Section):
    """What the evidence cannot show about the model."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    license: str
    language: Annotated[tuple[LanguageCode, ...], Field(min_length=1)] | None
    intended_use: Annotated[str, Field(min_length=1)] | None
    out_of_scope: Annotated[str, Field(min_length=1)] | None


def _expectation_types() -> list[str]:
    """Return the names of Great Expectations' own expectations, read and not imported: that takes seconds.

    Empty where it is not installed, as on a server.
    """
    package = importlib.util.find_spec("great_expectations")
    if package is None or package.origin is None:
        return []
    core = Path(package.origin).parent / "expectations" / "core" / "__init__.py"
    return sorted(set(re.findall(r"\bExpect\w+", core.read_text(encoding="utf-8"))))


def _inside_data(path: str) -> bool:
    parts = Path(path).parts
    return len(parts) > 1 and parts[0] == "data" and ".." not in parts
