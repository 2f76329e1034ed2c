"""Rows that a model can be trained on or asked: the chat template writes them, and they are not too long.

`preflight` counts and names the others before anything is trained; each later stage leaves out the same rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stages.common.chat.template import Encoded, TemplateRefusal, encode_example
from stages.common.records import Row

REFUSED = "refused_by_template"
LONG = "too_long"

# An answer a quarter longer than the longest reference rambles; waiting for its end costs only time.
ANSWER_ROOM = 1.25

Fitting = list[tuple[Row, Encoded]]


@dataclass(frozen=True, slots=True)
class Misfit:
    """A row that is left out, with the reason: a word to count by, and a detail."""

    row: Row
    reason: str
    detail: str


def encode_fitting(
    tokenizer: Any,
    rows: Sequence[Row],
    max_tokens: int | None = None,
) -> tuple[Fitting, list[Misfit]]:
    """Return the rows that fit with their token ids, and the misfits.

    Args:
        max_tokens: the most that prompt and answer may have together; None for any number.

    Raises:
        InputError: the chat template is none that a model can be taught with, whatever the row.
    """
    fitting: Fitting = []
    misfits = []
    for row in rows:
        try:
            example = encode_example(tokenizer, row.messages)
        except TemplateRefusal as error:
            misfits.append(Misfit(row, REFUSED, error.what))
            continue
        tokens = len(example.input_ids)
        if max_tokens is not None and tokens > max_tokens:
            misfits.append(Misfit(row, LONG, f"{tokens} tokens, at most {max_tokens} fit"))
        else:
            fitting.append((row, example))
    return fitting, misfits


def select_askable(
    tokenizer: Any, rows: Sequence[Row], max_new_tokens: int, context_tokens: int | None
) -> tuple[Fitting, list[Misfit]]:
    """Return the rows that a model can be asked and whose answer is within its context, and the misfits.

    Args:
        max_new_tokens: the length at which answers are cut, if a reference is that long.
    """
    fitting, misfits = encode_fitting(tokenizer, rows, context_tokens)
    longest = max((len(example.input_ids) - example.prompt_length for _, example in fitting), default=0)
    room = limit_answer(longest, max_new_tokens)
    askable: Fitting = []
    for row, example in fitting:
        needed = example.prompt_length + room
        if context_tokens is not None and needed > context_tokens:
            detail = f"{needed} tokens with its answer, at most {context_tokens} fit"
            misfits.append(Misfit(row, LONG, detail))
        else:
            askable.append((row, example))
    return askable, misfits


def limit_answer(longest: int, max_new_tokens: int) -> int:
    """Return after how many tokens an answer is cut: room for the longest reference, within the limit."""
    return min(max_new_tokens, math.ceil(longest * ANSWER_ROOM))


def count_reasons(misfits: Sequence[Misfit]) -> dict[str, int]:
    """Return the number of misfits of each reason."""
    return dict(sorted(Counter(misfit.reason for misfit in misfits).items()))


def describe_misfits(misfits: Sequence[Misfit], shown: int = 10) -> str:
    """Return the first misfits as lines that name the rows."""
    lines = [
        f"  row {misfit.row.id} from {misfit.row.source}: {misfit.reason}: {misfit.detail}: "
        f"{misfit.row.question[:60]!r}"
        for misfit in misfits[:shown]
    ]
    more = [f"  and {len(misfits) - shown} more"] if len(misfits) > shown else []
    return "\n".join([*lines, *more])
