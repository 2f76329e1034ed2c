"""What every kind of task defines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from stages.common.errors import InputError
from stages.common.messages import Message
from stages.common.task.metrics import LOSS, Metric

Schema = dict[str, Any]


class Task(ABC):
    """One kind of task with its settings; implementations are frozen dataclasses.

    Attributes:
        kind: the word for it in params.yaml.
        meanings: what each metric measures, in the order in which they are shown; `primary` comes first.
        error_types: worst first.
        answers_are_json: whether an answer is JSON text, so that a schema constrains it as JSON.
    """

    kind: ClassVar[str]
    error_types: ClassVar[tuple[str, ...]]
    answers_are_json: ClassVar[bool]

    @property
    @abstractmethod
    def primary(self) -> str:
        """Return the metric that decides between two models; its scale is never None."""

    @property
    @abstractmethod
    def class_name(self) -> str | None:
        """Return what the classes are called in reports; None where answers have none."""

    @property
    @abstractmethod
    def closed_set(self) -> tuple[str, ...] | None:
        """Return every answer there is, sorted; None where the set of answers is open."""

    @property
    @abstractmethod
    def meanings(self) -> Mapping[str, str]:
        """Return what each metric measures, by its name."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the task as plain values, which `kinds.read_task` reads again."""

    @abstractmethod
    def find_problem(self, answer: str) -> str | None:
        """Return why a text is not an answer that a model may learn, or None."""

    def canonical(self, answer: str) -> str:
        """Return a text that is equal for answers that mean the same: the answer without outer space."""
        return answer.strip()

    def rewrite(self, answer: str, schema: Mapping[str, Any] | None, separators: tuple[str, str]) -> str:
        """Return a valid answer as the model writes it: JSON with its keys in order, and no outer space."""
        return answer.strip()

    @abstractmethod
    def has_one_answer(self, answer: str) -> bool:
        """Return whether a prompt with this answer has no other right one: two contradict each other."""

    @abstractmethod
    def read_class(self, answer: str) -> str | None:
        """Return the class of an answer; None for an answer without one."""

    @abstractmethod
    def is_valid(self, answer: str, reference: str) -> bool:
        """Return whether an answer could be used at all, right or wrong."""

    @abstractmethod
    def score(self, answers: Sequence[str], references: Sequence[str]) -> dict[str, Metric]:
        """Return the metrics of a model's answers, each of which is in `meanings`."""

    @abstractmethod
    def find_errors(self, answer: str, reference: str) -> dict[str, str]:
        """Return what is wrong with an answer by error type; empty if it is right."""

    @abstractmethod
    def derive_schema(self, answers: Sequence[str]) -> Schema | None:
        """Return a JSON schema that all these answers fit; None where any text is an answer."""

    @abstractmethod
    def fits(self, schema: Mapping[str, Any] | None, answer: str) -> bool:
        """Return whether an answer fits a schema of `derive_schema`."""

    def to_message(self, answer: str) -> Message:
        """Return the turn that an answer is, as a row has it."""
        return Message("assistant", answer)

    def format_answer(self, answer: str) -> str:
        """Return an answer as people read it in a report: the answer itself."""
        return answer

    def nearness(self, answer: str, reference: str) -> float:
        """Return how near a wrong answer comes to the reference, for ranking errors of one type."""
        return 0.0

    def is_right(self, answer: str, reference: str) -> bool:
        """Return whether an answer means the same as the reference."""
        return self.canonical(answer) == self.canonical(reference)

    def check_comparable(self, answers: Sequence[str], name: str, key: str) -> None:
        """Check that answers such as these have a metric, and that more of it, or less, is better.

        Args:
            name: of a metric, or the loss.
            key: the key of params.yaml that names it.

        Raises:
            InputError: with the metrics that can be chosen.
        """
        scored = self.score(answers, answers)
        # A metric without a largest value has its best one somewhere between: lengths that are equal.
        known = [LOSS, *(n for n in self.meanings if n in scored and scored[n].scale is not None)]
        if name in known:
            return
        problem = (
            f"neither more nor less of it is better ({self.meanings[name]})"
            if name in scored
            else f"answers of kind {self.kind} have none"
        )
        raise InputError(f"{key} is {name}, and {problem}", f"set it to one of {', '.join(known)}")

    def is_lower_better(self, name: str) -> bool:
        """Return whether a model is better with less of a metric, or of the loss."""
        return name == LOSS or "lower is better" in self.meanings[name]

    def score_primary(self, answers: Sequence[str], references: Sequence[str]) -> Metric:
        """Return the metric that decides, between 0 and 1."""
        return self.score(answers, references)[self.primary].as_share()
