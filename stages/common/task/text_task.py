"""Tasks whose answer is any text: a reply, a summary, a translation, a turn of a free conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from typing_extensions import override

from stages.common.messages import is_malformed, read_calls
from stages.common.task.metrics import Metric
from stages.common.task.protocol import Schema, Task
from stages.common.task.text_metrics import score_text

PrimaryMetric = Literal["chrf", "exact_match"]
MEANINGS = {
    "chrf": "corpus chrF2, overlap of character n-grams in any script, 0 to 100",
    "exact_match": "answers equal to the reference, but for space at the ends",
    "rouge_l": "mean F1 of the longest common subsequence of words",
    "bleu": "corpus BLEU, 0 to 100",
    "length_ratio": "characters of the answers over those of the references; 1 is as long",
}


@dataclass(frozen=True, slots=True)
class TextTask(Task):
    """Any text is an answer.

    Attributes:
        primary_metric: chrf, which means the same in every script (Popović 2015), or exact_match.
    """

    primary_metric: PrimaryMetric = "chrf"
    kind: ClassVar[str] = "text"
    error_types: ClassVar[tuple[str, ...]] = ("empty", "other text")
    answers_are_json: ClassVar[bool] = False

    @property
    @override
    def primary(self) -> str:
        return self.primary_metric

    @property
    @override
    def class_name(self) -> None:
        return None

    @property
    @override
    def closed_set(self) -> None:
        return None

    @property
    @override
    def meanings(self) -> Mapping[str, str]:
        return {self.primary: MEANINGS[self.primary], **MEANINGS}

    @override
    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "label_key": None, "labels": None, "primary_metric": self.primary_metric}

    @override
    def find_problem(self, answer: str) -> str | None:
        if read_calls(answer) or is_malformed(answer):
            return f"the answer calls a tool, and answers of kind {self.kind} are text (task.kind: tools)"
        return None if answer.strip() else "the answer is empty"

    @override
    def has_one_answer(self, answer: str) -> bool:
        return False

    @override
    def read_class(self, answer: str) -> None:
        return None

    @override
    def is_valid(self, answer: str, reference: str) -> bool:
        return bool(answer.strip())

    @override
    def score(self, answers: Sequence[str], references: Sequence[str]) -> dict[str, Metric]:
        return score_text(answers, references)

    @override
    def find_errors(self, answer: str, reference: str) -> dict[str, str]:
        if self.is_right(answer, reference):
            return {}
        if not answer.strip():
            return {"empty": "no text"}
        return {"other text": f"chrF {self.nearness(answer, reference):.0f}"}

    @override
    def nearness(self, answer: str, reference: str) -> float:
        return score_text([answer], [reference])["chrf"].value()

    @override
    def derive_schema(self, answers: Sequence[str]) -> Schema | None:
        return None

    @override
    def fits(self, schema: Mapping[str, Any] | None, answer: str) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class ChatTask(TextTask):
    """A free conversation: each turn of the assistant is any text, judged as a `TextTask` judges it."""

    kind: ClassVar[str] = "chat"
