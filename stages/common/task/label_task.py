"""Tasks whose answer is one label of a closed set, written as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import override

from stages.common.task.label_metrics import score_f1
from stages.common.task.metrics import Metric, compute_share
from stages.common.task.protocol import Schema, Task

MEANINGS = {
    "accuracy": "answers with the right label",
    "macro_f1": "mean F1 of the classes, each counted alike",
    "weighted_f1": "mean F1 of the classes, weighted by their rows",
    "valid_output": "answers that are one of the labels",
}


@dataclass(frozen=True, slots=True)
class LabelTask(Task):
    """An answer is one of `labels`, which are sorted; accuracy decides."""

    labels: tuple[str, ...]
    kind: ClassVar[str] = "label"
    error_types: ClassVar[tuple[str, ...]] = ("invalid", "wrong label")
    answers_are_json: ClassVar[bool] = False

    @property
    @override
    def primary(self) -> str:
        return "accuracy"

    @property
    @override
    def class_name(self) -> str:
        return "label"

    @property
    @override
    def closed_set(self) -> tuple[str, ...]:
        return self.labels

    @property
    @override
    def meanings(self) -> Mapping[str, str]:
        return MEANINGS

    @override
    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "label_key": None, "labels": list(self.labels)}

    @override
    def find_problem(self, answer: str) -> str | None:
        label = answer.strip()
        if not label:
            return "the label is empty"
        if len(label.splitlines()) > 1:
            return "a label is one line of text"
        if label not in self.labels:
            return f"{label[:40]!r} is not one of the {len(self.labels)} labels (task.labels)"
        return None

    @override
    def has_one_answer(self, answer: str) -> bool:
        return True

    @override
    def read_class(self, answer: str) -> str | None:
        label = answer.strip()
        return label if label in self.labels else None

    @override
    def is_valid(self, answer: str, reference: str) -> bool:
        return self.read_class(answer) is not None

    @override
    def score(self, answers: Sequence[str], references: Sequence[str]) -> dict[str, Metric]:
        answered = [self.read_class(answer) for answer in answers]
        expected = [reference.strip() for reference in references]
        return {
            "accuracy": compute_share([a == e for a, e in zip(answered, expected, strict=True)]),
            **score_f1(answered, expected),
            "valid_output": compute_share([label is not None for label in answered]),
        }

    @override
    def find_errors(self, answer: str, reference: str) -> dict[str, str]:
        if self.is_right(answer, reference):
            return {}
        if self.read_class(answer) is None:
            return {"invalid": "not one of the labels"}
        return {"wrong label": f"{answer.strip()}, not {reference.strip()}"}

    @override
    def derive_schema(self, answers: Sequence[str]) -> Schema | None:
        return {"enum": list(self.labels)}

    @override
    def fits(self, schema: Mapping[str, Any] | None, answer: str) -> bool:
        return self.find_problem(answer) is None
