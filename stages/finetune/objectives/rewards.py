"""What a sampled answer is worth, by the project's own checks of answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from stages.common.errors import InputError
from stages.common.records import Row
from stages.common.task.protocol import Task

CHECKS = ("valid", "schema", "match")
COMPARED = "compared"  # the figure of groups whose answers are not all worth the same


@dataclass(frozen=True, slots=True)
class Checks:
    """The checks of a task, and what passing each is worth.

    Attributes:
        schema: of the training answers; None where any text is an answer.
        weights: by check, as `finetune.rewards`.
    """

    task: Task
    schema: Mapping[str, Any] | None
    weights: Mapping[str, float]

    def run(self, row: Row, answer: str | None) -> dict[str, float]:
        """Return 1 or 0 for each check of an answer to a row; one that was cut (None) passes none.

        valid: it could be used at all. schema: it fits the schema of the training answers. match: it means
        the same as the reference.
        """
        if answer is None:
            return dict.fromkeys(CHECKS, 0.0)
        is_valid = self.task.is_valid(answer, row.answer)
        return {
            "valid": float(is_valid),
            "schema": float(is_valid and self.task.fits(self.schema, answer)),
            "match": float(self.task.is_right(answer, row.answer)),
        }

    def weigh(self, passed: Mapping[str, float]) -> float:
        """Return the reward of an answer that passed these checks."""
        return sum(weight * passed[name] for name, weight in self.weights.items())


def check_compared(figures: Sequence[Mapping[str, float]]) -> None:
    """Check that some group had answers of different worth, by the figures of all updates.

    Raises:
        InputError: none had, so that nothing was learned.
    """
    if any(one.get(COMPARED, 1.0) for one in figures):
        return
    raise InputError(
        f"nothing was learned: in {len(figures)} updates the answers of each group were worth the same "
        f"(mean reward {fmean(one['reward'] for one in figures):.3f})",
        "start from an adapter of method lora, raise finetune.temperature or finetune.group_size, or reward "
        "what some answers pass (finetune.rewards)",
    )


def make_checks(task: Task, answers: Sequence[str], weights: Mapping[str, float]) -> Checks:
    """Return the checks of a task whose training answers are these."""
    return Checks(task, task.derive_schema(answers), weights)
