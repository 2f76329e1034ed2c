"""Ask the model that is being trained a sample of the validation rows, and compare its answers.

The same rows at every point, so that points differ by what was learned and not by what was asked. Answers are
generated and scored by the functions that `evaluate` uses; nothing is drawn at random, so a training with
these points learns the same, bit for bit, as one without them. Several processes share the rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from stages.common.chat.fitting import limit_answer
from stages.common.chat.turns import unroll
from stages.common.logs import get_logger
from stages.common.messages import LearnedTurns
from stages.common.model.generation import EvalPrompt, answer_questions, encode_questions
from stages.common.records import Row
from stages.common.task.metrics import LOSS
from stages.common.task.protocol import Task
from stages.finetune.devices.group import count_processes, gather, get_rank

logger = get_logger("finetune")

T = TypeVar("T")

ENTRY = "validation"  # the key of a point in the Trainer's history, which is part of every checkpoint


@dataclass(frozen=True, slots=True)
class ValidationPoint:
    """How the model was after an update.

    Attributes:
        loss: per answer token, over the sample.
        metrics: of the task, by name.
    """

    step: int
    loss: float
    metrics: Mapping[str, float]

    def read(self, name: str) -> float:
        """Return a metric, or the loss."""
        return self.loss if name == LOSS else self.metrics[name]

    def describe(self, primary: str) -> str:
        """Return the point in a few words, the metric that decides first."""
        names = [primary, *(name for name in self.metrics if name != primary)]
        shown = [f"{name} {self.metrics[name]:.3f}" for name in names if name in self.metrics]
        return ", ".join([f"loss {self.loss:.4f}", *shown])


@dataclass(frozen=True, slots=True)
class Sample:
    """Validation rows, one for each learned turn, as questions.

    Attributes:
        limit: tokens after which an answer is cut.
    """

    task: Task
    tokenizer: Any
    rows: Sequence[Row]
    questions: Sequence[EvalPrompt]
    limit: int

    def ask(self, model: Any, step: int, at_once: int) -> ValidationPoint:
        """Return the loss and the task's metrics of the greedy answers of a model.

        Each process asks its share of the questions; all return the same point.

        Args:
            at_once: the questions of a batch.
        """
        from stages.finetune.devices.sharding import keep_in_step

        was_training = model.training
        model.eval()
        share = self.questions[get_rank() :: count_processes()]
        with keep_in_step(model, lambda: read_one_token(model)):
            answers = answer_questions(model, self.tokenizer, share, at_once, self.limit)
        model.train(was_training)
        found = merge_shares(gather([(answer.text, answer.reference_loss) for answer in answers]))
        tokens = sum(len(question.reference) for question in self.questions)
        loss = sum(loss for _, loss in found) / tokens
        point = ValidationPoint(step, loss, self._score([text for text, _ in found]))
        # Another processor may round the last digit of a metric in another way; all decide by one point.
        return gather(point)[0]

    def check_metric(self, name: str) -> None:
        """Check that the points will have a metric, and that more of it, or less, is better.

        Raises:
            InputError: with the metrics that can be chosen.
        """
        answers = [row.answer for row in self.rows]
        self.task.check_comparable(answers, name, "finetune.early_stopping.metric")

    def read_scales(self) -> dict[str, float]:
        """Return the largest value of each metric that has one."""
        answers = [row.answer for row in self.rows]
        return {
            name: metric.scale for name, metric in self.task.score(answers, answers).items() if metric.scale
        }

    def is_lower_better(self, name: str) -> bool:
        """Return whether a model is better with less of a metric."""
        return self.task.is_lower_better(name)

    def describe(self) -> dict[str, Any]:
        """Return everything that decides what the points are, besides the model."""
        ids = [row.id for row in self.rows]
        return {"task": self.task.describe(), "rows": ids, "limit": self.limit}

    def _score(self, answers: Sequence[str]) -> dict[str, float]:
        found = self.task.score(answers, [row.answer for row in self.rows])
        return {name: found[name].value() for name in self.task.meanings if name in found}


def draw_sample(
    task: Task,
    tokenizer: Any,
    rows: Sequence[Row],
    turns: LearnedTurns,
    count: int,
    max_new_tokens: int,
    seed: int,
    positions: int | None = None,
) -> Sample | None:
    """Return a sample of the learned turns of rows; None where there are none, or none fits.

    Args:
        count: the most turns.
        max_new_tokens: where answers are cut, if a reference is that long.
        positions: of the model, into which a question has to fit with the longest answer; None for any.
    """
    candidates = {row.id: row for row in unroll(rows, turns)}
    order = sorted(candidates, key=lambda name: hashlib.blake2b(f"{seed}/{name}".encode()).digest())
    drawn: set[str] = set()
    widest = longest = too_long = 0
    for name in order:
        if len(drawn) == count:
            break
        (question,) = encode_questions(tokenizer, [candidates[name]])
        prompt, reference = max(widest, len(question.prompt)), max(longest, len(question.reference))
        needed = prompt + limit_answer(reference, max_new_tokens)
        if positions is not None and needed > positions:
            too_long += 1
            continue
        drawn.add(name)
        widest, longest = prompt, reference
    if too_long:
        logger.warning(
            "%d validation rows are not asked: with an answer of the length that is allowed "
            "they exceed the %d positions of the base model",
            too_long,
            positions,
        )
    if not drawn:
        return None
    chosen = [row for name, row in candidates.items() if name in drawn]
    questions = encode_questions(tokenizer, chosen)
    return Sample(task, tokenizer, chosen, questions, limit_answer(longest, max_new_tokens))


def merge_shares(shares: Sequence[Sequence[T]]) -> list[T]:
    """Return the items of which each of n shares has every n-th, in their order."""
    merged: list[Any] = [None] * sum(map(len, shares))
    for rank, share in enumerate(shares):
        merged[rank :: len(shares)] = share
    return merged


def plan_points(steps: int, every: float) -> frozenset[int]:
    """Return the updates after which the sample is asked: evenly spread, and the last one.

    Args:
        every: the share of the training between two points.
    """
    count = max(1, round(1 / every))
    return frozenset(max(1, round(steps * number / count)) for number in range(1, count + 1))


def read_points(history: Sequence[Mapping[str, Any]]) -> list[ValidationPoint]:
    """Return the points in a Trainer's history."""
    return [ValidationPoint(entry["step"], **entry[ENTRY]) for entry in history if ENTRY in entry]


def read_one_token(model: Any) -> None:
    """Make the shortest pass of a model."""
    import torch

    with torch.no_grad():
        model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), use_cache=False)


@contextmanager
def attending(model: Any, attention: str) -> Iterator[None]:
    """Let a model attend in another way inside the block: the training's own needs a batch of rows."""
    base, before = _find_base(model), read_attention(model)
    if before == attention:
        yield
        return
    base.set_attn_implementation(attention)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def read_attention(model: Any) -> str:
    """Return the name of the attention that a model computes with."""
    return str(_find_base(model).config._attn_implementation)


def _find_base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
