"""Pairs from a model's own errors: the row's answer, and a wrong one that the model sampled."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.conversations import run_many
from services.engines.offline import answer_limit
from services.engines.paged.engine import PagedEngine
from services.engines.protocol import Sampling
from stages.common.chat.calls import read_answer
from stages.common.errors import InputError
from stages.common.messages import Message
from stages.common.model.generation import encode_questions
from stages.common.model.loading import load_tokenizer
from stages.common.records import Row
from stages.common.task.protocol import Task

SEED = 7
TEMPERATURE = 1.0
HELD_OUT = 0.3  # of the groups with errors


def find_errors(
    base: Path, gguf: Path, rows: Sequence[Row], count: int, task: Task, max_new_tokens: int
) -> list[Row]:
    """Ask a model `count` of the rows once, and return those with a wrong answer, which is the rejected one.

    An answer that was cut, or is empty, is left out.

    Args:
        base: the folder of its tokenizer; gguf: the model.

    Raises:
        InputError: no answer was wrong.
    """
    chosen = random.Random(SEED).sample(list(rows), min(count, len(rows)))
    tokenizer = load_tokenizer(base)
    questions = encode_questions(tokenizer, chosen)
    limit = answer_limit(questions, max_new_tokens)
    engine = PagedEngine(gguf, tokenizer)
    try:
        found = asyncio.run(
            run_many(
                engine,
                [question.prompt for question in questions],
                lambda number: Sampling(limit, TEMPERATURE, seed=number),
                range(len(chosen)),
            )
        )
    finally:
        engine.close()
    wrong = []
    for row, (tokens, ended) in zip(chosen, found, strict=True):
        text = read_answer(tokenizer, tokens, bool(row.tools))
        if ended and text.strip() and not task.is_right(text, row.answer):
            wrong.append(replace(row, rejected=_write_message(task, text)))
    if not wrong:
        cut = sum(not ended for _, ended in found)
        raise InputError(
            f"none of {len(chosen)} sampled answers is whole and wrong; {cut} were cut",
            "ask more: --own-errors",
        )
    return wrong


def share_out(pairs: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Return the pairs to learn and those to measure on, with all of a group on one side."""
    groups = sorted({pair.group for pair in pairs})
    if len(groups) < 2:
        raise InputError(f"the {len(pairs)} errors are all of one group", "ask more: --own-errors")
    apart = set(random.Random(SEED).sample(groups, max(1, round(HELD_OUT * len(groups)))))
    sides: tuple[list[Row], list[Row]] = ([], [])
    for pair in pairs:
        sides[pair.group in apart].append(pair)
    return sides


def _write_message(task: Task, text: str) -> Message:
    return Message("assistant", text) if task.find_problem(text) else task.to_message(text)
