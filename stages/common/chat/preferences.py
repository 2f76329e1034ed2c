"""Pairs of answers to one prompt, and answers that people rated, as token ids.

`preflight` counts them before anything is trained, and `finetune` trains on the same ones. Only the last
answer of a conversation is compared: what is before it is the prompt of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from stages.common.chat.fitting import LONG, REFUSED, TOKEN_BYTES, Misfit
from stages.common.chat.template import Encoded, TemplateRefusal, encode_example
from stages.common.logs import ROWS_A_STEP
from stages.common.messages import Message
from stages.common.records import Row, count_chars
from stages.common.spool import Spool


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, of which people prefer the first."""

    row: Row
    chosen: Encoded
    rejected: Encoded


@dataclass(frozen=True, slots=True)
class RatedAnswer:
    """An answer that people found good or bad."""

    row: Row
    answer: Encoded
    is_desirable: bool


def encode_pairs(
    tokenizer: Any,
    rows: Iterable[Row],
    max_tokens: int | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> tuple[Sequence[Pair], Sequence[Misfit]]:
    """Return the pairs of the rows that have a rejected answer and fit with both, and the misfits.

    Args:
        max_tokens: the most that prompt and answer may have together; None for any number.
        on_progress: called with the number of rows encoded, now and then.

    Raises:
        InputError: the chat template is none that a model can be taught with, whatever the row.
    """
    pairs = Spool[Pair](lambda pair: _measure(pair.row, pair.chosen, pair.rejected))
    misfits = Spool[Misfit](lambda misfit: count_chars(misfit.row))
    for number, row in enumerate(rows, start=1):
        if number % ROWS_A_STEP == 0:
            on_progress(number)
        if row.rejected is None:
            continue
        encoded = [_encode(tokenizer, row, answer, max_tokens) for answer in (row.messages[-1], row.rejected)]
        misfit = next((one for one in encoded if isinstance(one, Misfit)), None)
        if misfit:
            misfits.append(misfit)
            continue
        chosen, rejected = (one for one in encoded if isinstance(one, Encoded))
        pairs.append(Pair(row, chosen, rejected))
    return pairs, misfits


def encode_ratings(
    tokenizer: Any,
    rows: Iterable[Row],
    max_tokens: int | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> tuple[Sequence[RatedAnswer], Sequence[Misfit]]:
    """Return the rated answers that fit, and the misfits; arguments and errors as of `encode_pairs`.

    Of a row with a rejected answer both answers are rated: the first is good, the rejected one bad.
    """
    rated = Spool[RatedAnswer](lambda one: _measure(one.row, one.answer))
    misfits = Spool[Misfit](lambda misfit: count_chars(misfit.row))
    for number, row in enumerate(rows, start=1):
        if number % ROWS_A_STEP == 0:
            on_progress(number)
        for answer, is_desirable in list_ratings(row):
            encoded = _encode(tokenizer, row, answer, max_tokens)
            if isinstance(encoded, Misfit):
                misfits.append(encoded)
            else:
                rated.append(RatedAnswer(row, encoded, is_desirable))
    return rated, misfits


def list_ratings(row: Row) -> Iterator[tuple[Message, bool]]:
    """Yield each answer of a row that people rated, and whether they found it good.

    A thumb up in production is a rating; an answer that no one compared or rated is none, right as it may be.
    """
    if row.rejected or row.is_desirable or row.tags.get("feedback") == "thumb":
        yield row.messages[-1], True
    if row.is_desirable is False:
        yield row.messages[-1], False
    if row.rejected:
        yield row.rejected, False


def _encode(tokenizer: Any, row: Row, answer: Message, max_tokens: int | None) -> Encoded | Misfit:
    try:
        example = encode_example(tokenizer, [*row.messages[:-1], answer], row.tools)
    except TemplateRefusal as error:
        return Misfit(row, REFUSED, error.what)
    tokens = len(example.input_ids)
    if max_tokens is not None and tokens > max_tokens:
        return Misfit(row, LONG, f"{tokens} tokens, at most {max_tokens} fit")
    return example


def _measure(row: Row, *examples: Encoded) -> int:
    return count_chars(row) + TOKEN_BYTES * sum(len(example.input_ids) for example in examples)
