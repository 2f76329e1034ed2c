"""The training data: which rows are trained on, as token ids, in which batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from typing import Any

from stages.common.chat.fitting import (
    LONG,
    Fitting,
    Misfit,
    count_reasons,
    describe_misfits,
    encode_fitting,
    select_misfits,
    suggest_for_long,
    suggest_room,
)
from stages.common.chat.template import Encoded
from stages.common.errors import InputError
from stages.common.logs import get_logger, show_progress
from stages.common.messages import LearnedTurns
from stages.common.model.label_head import encode_label
from stages.common.records import Row
from stages.common.spool import view

logger = get_logger("finetune")

# Rows of about one length share a batch; rows this many batches apart never do, so the order stays random.
BATCHES_SORTED_TOGETHER = 20


def encode_rows(
    tokenizer: Any,
    rows: Sequence[Row],
    max_length: int,
    on_long_row: str,
    learned_turns: LearnedTurns,
    limit: int | None = None,
    labels: Sequence[str] = (),
    virtual_tokens: int = 0,
) -> tuple[Sequence[Encoded], Sequence[str], Sequence[Misfit]]:
    """Return the rows as token ids, the id of the row of each, and the rows excluded.

    Excluded are rows that are too long, and those that the template refuses.

    Args:
        max_length: the most tokens of a row, as in params.yaml.
        limit: the most tokens where the base model has fewer positions (`limit_length`); None: `max_length`.
        labels: whose numbers are learned instead of their tokens; none for tokens.
        virtual_tokens: learned ones before every row, for which the limit leaves room.

    Raises:
        InputError: a row is too long and `on_long_row` is `stop`, or no row is left.
    """
    limit = limit or max_length
    fitting, misfits = encode_fitting(
        tokenizer,
        rows,
        limit,
        lambda done: show_progress(logger, done, len(rows), "rows encoded"),
        learned_turns,
    )
    long = select_misfits(misfits, LONG)
    if long and on_long_row == "stop":
        raise InputError(
            f"{len(long)} of {len(rows)} rows are longer than {limit} tokens:\n{describe_misfits(long)}",
            suggest_for_long(limit, max_length, virtual_tokens),
        )
    if rows and not fitting:
        room = suggest_room(limit, max_length, virtual_tokens)
        raise InputError(
            f"all {len(rows)} rows are excluded: {count_reasons(misfits)}\n{describe_misfits(misfits, 3)}",
            f"{room} for rows that are too long; for rows that the chat template refuses, "
            "set task.system_prompt: null, correct their roles, or choose another base model",
        )
    return view_examples(fitting, labels), view(fitting, _read_id), misfits


def view_examples(fitting: Fitting, labels: Sequence[str] = ()) -> Sequence[Encoded]:
    """Return what is learned of rows: the tokens of their answers, or the numbers of their labels."""
    return view(fitting, partial(_encode_label, tuple(labels)) if labels else itemgetter(1))


def _encode_label(labels: Sequence[str], pair: tuple[Row, Encoded]) -> Encoded:
    return encode_label(pair[1], pair[0].answer, labels)


def _read_id(pair: tuple[Row, Encoded]) -> str:
    return pair[0].id


def plan_batches(lengths: Sequence[int], batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """Return the batches of the whole training, as row numbers; equal arguments give equal batches.

    Each epoch takes every row once, in its own random order, with rows of about one length together.
    """
    plan: list[list[int]] = []
    for epoch in range(epochs):
        rng = random.Random(f"{seed} {epoch}")
        order = list(range(len(lengths)))
        rng.shuffle(order)
        batches = []
        reach = batch_size * BATCHES_SORTED_TOGETHER
        for start in range(0, len(order), reach):
            near = sorted(order[start : start + reach], key=lambda row: (lengths[row], row))
            batches += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
        rng.shuffle(batches)
        plan += batches
    return plan


def deal_out(plan: Sequence[list[int]], processes: int) -> list[list[int]]:
    """Return each process's share of each batch: those of the first batch by process, then of the second.

    A share takes every n-th row of a batch, whose rows are sorted by length, so that shares are about equally
    long. A batch with fewer rows than processes leaves some shares empty.
    """
    return [batch[rank::processes] for batch in plan for rank in range(processes)]


def count_tokens(plan: Sequence[Sequence[int]], lengths: Sequence[int], accumulation: int) -> list[int]:
    """Return the tokens of each update: `accumulation` batches of the plan at a time."""
    return [
        sum(lengths[row] for batch in plan[first : first + accumulation] for row in batch)
        for first in range(0, len(plan), accumulation)
    ]
