"""`params.yaml`, typed and checked before any work.

Run `perennial params` to check the file and print nothing but its problems.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import override

from stages.common.errors import ParamsError
from stages.common.params.checked_yaml import (
    Document,
    Problem,
    Section,
    check_section,
    duplicate_keys,
    nearest,
    parse,
    unknown_key,
)
from stages.common.params.loop import Flows, Monitoring
from stages.common.params.services import Services

# The environment's word for a key of params.yaml.
ENVIRONMENT = {
    "PERENNIAL_EVENTS_URL": ("services", "events", "url"),
    "PERENNIAL_KEYS_FILE": ("services", "access", "keys_file"),
    "PERENNIAL_TRACKING_URL": ("flows", "record", "tracking_url"),
}

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0.0)]


class FetchBase(Section):
    """Where the base model comes from."""

    origin: Literal["package", "hub", "folder"]
    name: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    file: str | None = None
    license: str | None = None

    @override
    def impossible(self) -> Iterator[tuple[str, str]]:
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
    seed: int = 7
    reserved_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0


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
    shape: Literal["chat", "sharegpt", "alpaca", "pair"] | None = None
    messages_column: str | None = None
    prompt_column: str | None = None
    context_column: str | None = None
    completion_column: str | None = None
    system_column: str | None = None
    group_column: str | None = None
    tag_columns: tuple[str, ...] = ()


class Feedback(Section):
    """What users said of answers, as rows to learn from."""

    kind: Literal["feedback"]
    path: str = "data/feedback/rows.jsonl"


Source = Annotated[HomeIntents | File | Feedback, Field(discriminator="kind")]


class Collect(Section):
    """What goes in."""

    system_prompt: str | None = None
    on_bad_row: Literal["reject", "stop"] = "reject"
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]

    @override
    def impossible(self) -> Iterator[tuple[str, str]]:
        for index, source in enumerate(self.sources):
            if isinstance(source, File | Feedback) and not _inside_data(source.path):
                yield (
                    f"sources.{index}.path",
                    "lies outside data/, where DVC could not see it change; move it there",
                )


class Curate(Section):
    """Which rows are kept."""

    answer_format: Literal["json", "text"]
    min_question_chars: Count = 1
    max_question_chars: PositiveCount
    max_answer_chars: PositiveCount
    near_duplicate_threshold: Fraction
    personal_data: tuple[Literal["email", "phone", "iban", "credit_card", "ipv4", "ssn"], ...] = ()

    @override
    def impossible(self) -> Iterator[tuple[str, str]]:
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

    min_rows: PositiveCount
    max_rows: PositiveCount
    allowed_licenses: Annotated[tuple[str, ...], Field(min_length=1)]
    max_prompt_chars: PositiveCount
    max_answer_chars: PositiveCount
    label_key: str | None = None
    min_labels: PositiveCount = 1
    max_labels: PositiveCount | None = None
    max_label_share: Fraction = 1.0
    severity: Severities = Severities()
    max_shown_rows: PositiveCount = 10
    expectations: tuple[dict[str, Any], ...] = ()

    @override
    def impossible(self) -> Iterator[tuple[str, str]]:
        if self.min_rows > self.max_rows:
            yield "min_rows", f"is above max_rows ({self.max_rows}): no table could pass"
        if self.max_labels is not None and self.min_labels > self.max_labels:
            yield "min_labels", f"is above max_labels ({self.max_labels}): no table could pass"
        known = _expectation_types() if self.expectations else []
        for index, expectation in enumerate(self.expectations):
            kind = expectation.get("type")
            if known and kind not in known:
                yield (
                    f"expectations.{index}",
                    f"has no type that is an expectation{nearest(str(kind), known)}",
                )


class GroupLimits(Section):
    """What one group is held to; null measures and does not judge."""

    min_representation_ratio: Fraction | None
    max_cramers_v: Fraction | None


class CheckBias(Section):
    """How balanced the rows must be."""

    label_key: str | None = None
    groups: Annotated[dict[str, GroupLimits], Field(min_length=1)]
    min_rows: PositiveCount
    alpha: Annotated[float, Field(gt=0.0, lt=1.0)]
    permutations: PositiveCount
    seed: int

    @override
    def impossible(self) -> Iterator[tuple[str, str]]:
        tests = 2 * len(self.groups)  # of each group: the tie to the outcome, and to being dropped
        if tests / (self.permutations + 1) >= self.alpha:
            yield (
                "permutations",
                f"are too few: with {tests} tests corrected for their number, no p-value could fall below "
                f"alpha ({self.alpha}); {math.ceil(tests / self.alpha)} could",
            )


class Split(Section):
    """Which rows are learned, and which are asked."""

    validation_fraction: Fraction
    test_fraction: Annotated[float, Field(gt=0.0, lt=1.0)]
    stratify_by: str | None = None
    max_test_rows_per_group: PositiveCount
    min_train_rows: PositiveCount
    min_test_rows: PositiveCount
    near_duplicate_threshold: Fraction
    seed: int

    @override
    def impossible(self) -> Iterator[tuple[str, str]]:
        if self.validation_fraction + self.test_fraction >= 1.0:
            yield (
                "test_fraction",
                f"and validation_fraction ({self.validation_fraction}) leave nothing to train on",
            )


class AskBase(Section):
    """Which test rows are asked, and how: the base model first, then the tuned one alike."""

    engine: Literal["auto", "paged", "transformers"]
    max_rows: PositiveCount | None = None
    min_test_rows: PositiveCount
    batch_size: PositiveCount
    max_new_tokens: PositiveCount
    seed: int

    @override
    def impossible(self) -> Iterator[tuple[str, str]]:
        if self.max_rows is not None and self.max_rows < self.min_test_rows:
            yield "max_rows", f"is below min_test_rows ({self.min_test_rows}): the gate could never pass"


class Finetune(Section):
    """How the adapter is trained."""

    # One folder only: DVC watches it.
    warm_start_from: Literal["artifacts/initial_adapter"] | None = "artifacts/initial_adapter"
    replay_share: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    rank: PositiveCount
    alpha: Positive
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)]
    target_modules: str | tuple[str, ...]
    learning_rate: Positive
    schedule: Literal["cosine", "linear", "constant"]
    warmup_fraction: Fraction
    weight_decay: Annotated[float, Field(ge=0.0)]
    max_grad_norm: Positive
    batch_size: PositiveCount
    gradient_accumulation: PositiveCount
    epochs: PositiveCount
    max_length: PositiveCount
    on_long_row: Literal["drop", "stop"]
    checkpoint_every_steps: PositiveCount
    dtype: Literal["auto", "bfloat16", "float32"]
    seed: int


class Export(Section):
    """In which form the tuned model leaves the pipeline."""

    gguf: bool
    quantization: Literal["f16", "bf16", "q8_0", "q4_0"]
    examples: Count


class Evaluate(Section):
    """How base and tuned model are judged."""

    task: Literal["json", "text"]
    label_key: str | None = None
    slices: tuple[str, ...] = ()
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)]
    resamples: Annotated[int, Field(ge=100)]
    errors_shown: PositiveCount
    seed: int

    @override
    def impossible(self) -> Iterator[tuple[str, str]]:
        if self.task == "text" and self.label_key is not None:
            yield "label_key", "is set, but task: text has no labels; set it to null"


class ModelCard(Section):
    """What the evidence cannot say about the model."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    license: str
    language: Annotated[tuple[str, ...], Field(min_length=1)]
    intended_use: Annotated[str, Field(min_length=1)]
    out_of_scope: Annotated[str, Field(min_length=1)]


class Params(Section):
    """All of `params.yaml`."""

    fetch_base: FetchBase
    collect: Collect
    curate: Curate
    validate_: Validate = Field(alias="validate")
    check_bias: CheckBias
    split: Split
    ask_base: AskBase
    finetune: Finetune
    export: Export
    evaluate: Evaluate
    model_card: ModelCard
    services: Services
    monitoring: Monitoring
    flows: Flows


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check `params.yaml`.

    Where a service runs elsewhere, a variable of `ENVIRONMENT` takes the place of a key: secrets and
    mounted folders are told to a container by its environment.

    Raises:
        ParamsError: with every problem of the file: line, key, value, and the nearest right key.
    """
    path = Path(path)
    document = parse(path)
    _from_environment(document)
    models = {field.alias or name: field.annotation for name, field in Params.model_fields.items()}
    found = list(duplicate_keys(document.root))
    found += [unknown_key(document, (key,), models) for key in document.values if key not in models]
    sections = {}
    for key, model in models.items():
        if key not in document.values:
            found.append((1, f"{key}: missing section"))
            continue
        sections[key], problems = check_section(document, key, model)
        found += problems
    found += _impossible_across(document, sections)
    if found:
        lines = "\n".join(f"{path}:{line}: {text}" for line, text in sorted(found))
        count = "1 problem" if len(found) == 1 else f"{len(found)} problems"
        raise ParamsError(
            f"{count} in {path}\n{lines}", "mend the lines above; docs/reference/params.md has every key"
        )
    return Params.model_validate(sections)


def _from_environment(document: Document) -> None:
    for name, (section, part, key) in ENVIRONMENT.items():
        values = document.values.get(section, {}).get(part)
        if name in os.environ and isinstance(values, dict):
            values[key] = os.environ[name]


def _impossible_across(document: Document, sections: dict[str, Any]) -> Iterator[Problem]:
    """Yield the pairs of keys of two stages that cannot stand together."""
    curate, evaluate, split = (sections.get(key) for key in ("curate", "evaluate", "split"))
    ask_base = sections.get("ask_base")
    for stage in ("validate", "check_bias"):
        judge = sections.get(stage)
        if curate and judge and judge.label_key is not None and curate.answer_format != "json":
            yield (
                document.line((stage, "label_key")),
                f"{stage}.label_key: {judge.label_key!r} is a key of JSON answers, but curate.answer_format "
                f"is {curate.answer_format!r}; set it to null",
            )
    if curate and evaluate and evaluate.task == "json" and curate.answer_format != "json":
        yield (
            document.line(("evaluate", "task")),
            f"evaluate.task: 'json' needs curate.answer_format: json (value {curate.answer_format!r}); "
            "set both alike",
        )
    if split and ask_base and ask_base.min_test_rows > split.min_test_rows:
        yield (
            document.line(("ask_base", "min_test_rows")),
            f"ask_base.min_test_rows: {ask_base.min_test_rows} is above split.min_test_rows "
            f"({split.min_test_rows}): the split could pass and the gate refuse; set both alike",
        )


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


def main() -> None:
    """Check `params.yaml` and exit 2 with all its problems, or 0."""
    parser = argparse.ArgumentParser(
        prog="perennial params", description="Check params.yaml, and nothing else."
    )
    parser.add_argument("file", nargs="?", type=Path, default=Path("params.yaml"))
    try:
        load_params(parser.parse_args().file)
    except ParamsError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
