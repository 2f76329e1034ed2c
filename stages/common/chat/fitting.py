"""Rows that a model can be trained on or asked: the chat template writes them, and they are not too long.

`preflight` counts and names the others before anything is trained; each later stage excludes the same rows.
Of those that an adapter was trained on, a training that starts from it takes a share.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.common.chat.template import Encoded, TemplateRefusal, encode_conversation, render_example
from stages.common.chat.turns import list_learned
from stages.common.errors import InputError
from stages.common.logs import ROWS_A_STEP, get_logger
from stages.common.messages import LearnedTurns
from stages.common.records import Row, count_chars
from stages.common.spool import Spool, pick, spool

if TYPE_CHECKING:
    from stages.common.model.adapter import InitialAdapter

logger = get_logger("finetune")

REFUSED = "refused_by_template"
LONG = "too_long"

# An answer a quarter longer than the longest reference rambles; waiting for its end costs only time.
ANSWER_ROOM = 1.25
TOKEN_BYTES = 36  # of a token id in memory: a place in a list, and a number

Fitting = Sequence[tuple[Row, Encoded]]


@dataclass(frozen=True, slots=True)
class Misfit:
    """A row that is excluded, with the reason: a word to count by, and a detail."""

    row: Row
    reason: str
    detail: str


def encode_fitting(
    tokenizer: Any,
    rows: Iterable[Row],
    max_tokens: int | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
    learned_turns: LearnedTurns = "last",
) -> tuple[Fitting, Sequence[Misfit]]:
    """Return the rows that fit with their token ids, and the misfits.

    A conversation comes as often as the chat template makes several sequences of it (`encode_conversation`).

    Args:
        max_tokens: the most that prompt and answer may have together; None for any number.
        on_progress: called with the number of rows encoded, now and then.

    Raises:
        InputError: the chat template is none that a model can be taught with, whatever the row.
    """
    fitting, misfits = Spool(_count_pair), Spool(_count_misfit)
    for number, row in enumerate(rows, start=1):
        if number % ROWS_A_STEP == 0:
            on_progress(number)
        try:
            learned = list_learned(row.messages, learned_turns)
            examples = encode_conversation(tokenizer, row.messages, row.tools, learned)
        except TemplateRefusal as error:
            misfits.append(Misfit(row, REFUSED, error.what))
            continue
        tokens = max(len(example.input_ids) for example in examples)
        if max_tokens is not None and tokens > max_tokens:
            misfits.append(Misfit(row, LONG, f"{tokens} tokens, at most {max_tokens} fit"))
            continue
        for example in examples:
            fitting.append((row, example))
    return fitting, misfits


def find_refused(tokenizer: Any, rows: Iterable[Row]) -> set[str]:
    """Return the ids of the rows that the chat template refuses, as `encode_fitting` does, without tokens.

    Raises:
        InputError: the chat template is none that a model can be taught with, whatever the row.
    """
    refused = set()
    for row in rows:
        try:
            render_example(tokenizer, row.messages, row.tools)
        except TemplateRefusal:
            refused.add(row.id)
    return refused


def _count_pair(pair: tuple[Row, Encoded]) -> int:
    return count_chars(pair[0]) + TOKEN_BYTES * len(pair[1].input_ids)


def _count_misfit(misfit: Misfit) -> int:
    return count_chars(misfit.row)


def select_askable(
    tokenizer: Any,
    rows: Iterable[Row],
    max_new_tokens: int,
    context_tokens: int | None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> tuple[Fitting, Sequence[Misfit]]:
    """Return the rows that a model can be asked and whose answer is within its context, and the misfits.

    Args:
        max_new_tokens: the length at which answers are cut, if a reference is that long.
    """
    fitting, long = encode_fitting(tokenizer, rows, context_tokens, on_progress)
    longest = max((example.learned_count for _, example in fitting), default=0)
    room = limit_answer(longest, max_new_tokens)
    askable, misfits = Spool(_count_pair), Spool(_count_misfit)
    for misfit in long:
        misfits.append(misfit)
    for row, example in fitting:
        needed = example.prompt_length + room
        if context_tokens is not None and needed > context_tokens:
            detail = f"{needed} tokens with its answer, at most {context_tokens} fit"
            misfits.append(Misfit(row, LONG, detail))
        else:
            askable.append((row, example))
    return askable, misfits


def select_rows(
    rows: Sequence[Row],
    initial: InitialAdapter | None,
    trained_ids: Set[str],
    replay_share: float,
    seed: int,
) -> Sequence[Row]:
    """Return the rows that are new to the adapter of `initial`, and a share of those it was trained on.

    The share is drawn by a hash of the row ids and differs between initial adapters, so that over several
    retrainings every row has its turn. Without an initial adapter every row is new.

    Args:
        trained_ids: ids of the rows that the adapter was trained on.

    Raises:
        InputError: no row is left.
    """
    if initial is None:
        return rows
    if replay_share < 1 and not trained_ids:
        logger.warning(
            "the adapter of %s does not record the rows it was trained on: all rows are used", initial.version
        )

    def is_drawn(row: Row) -> bool:
        digest = hashlib.blake2b(f"{seed}/{initial.version}/{row.id}".encode(), digest_size=8).digest()
        return int.from_bytes(digest) < replay_share * 2**64

    chosen = [n for n, row in enumerate(rows) if row.id not in trained_ids or is_drawn(row)]
    if rows and not chosen:
        raise InputError(
            f"the adapter of {initial.version} was trained on all {len(rows)} training rows already",
            "raise finetune.replay_share, or set finetune.warm_start_from: null",
        )
    return pick(rows, chosen)


def limit_answer(longest: int, max_new_tokens: int) -> int:
    """Return after how many tokens an answer is cut: room for the longest reference, within the limit."""
    return min(max_new_tokens, math.ceil(longest * ANSWER_ROOM))


def list_with_room(
    examples: Iterable[Encoded], rows: int, limit: int, max_new_tokens: int
) -> tuple[list[int], int]:
    """Return which prompts leave room for a sampled answer, and how many tokens it may have.

    A sampled answer can be as long as any reference.

    Args:
        rows: how many were asked for, also those that are too long themselves.
        limit: the most tokens of a prompt with its answer.
        max_new_tokens: where an answer is cut at the latest.

    Raises:
        InputError: none does.
    """
    sizes = [(example.prompt_length, example.learned_count) for example in examples]
    room = limit_answer(max((learned for _, learned in sizes), default=0), max_new_tokens)
    asked = [number for number, (prompt, _) in enumerate(sizes) if prompt + room <= limit]
    if not asked:
        raise InputError(
            f"none of {rows} prompts leaves room for an answer of {room} tokens within {limit}",
            "raise finetune.max_length, or lower ask_base.max_new_tokens",
        )
    return asked, room


def suggest_for_long(limit: int, max_length: int, virtual_tokens: int = 0) -> str:
    """Return what can be done about training rows of more than `limit` tokens.

    Args:
        max_length, virtual_tokens: as for `suggest_room`.
    """
    room = suggest_room(limit, max_length, virtual_tokens)
    return f"{room}, shorten the rows, or set finetune.on_long_row: drop"


def suggest_room(limit: int, max_length: int, virtual_tokens: int = 0) -> str:
    """Return where room for longer rows could come from.

    Args:
        max_length: as in params.yaml; above the limit, it is the model's positions that are too few.
        virtual_tokens: learned ones before every row, which take positions, too.
    """
    if limit == max_length:
        return "raise finetune.max_length"
    longer = "choose a base model with a longer context"
    if not virtual_tokens:
        return longer
    taken = f"take {virtual_tokens} of the base model's {limit + virtual_tokens} positions"
    return f"lower finetune.num_virtual_tokens, which {taken}, {longer}"


def count_reasons(misfits: Iterable[Misfit]) -> dict[str, int]:
    """Return the number of misfits of each reason."""
    return dict(sorted(Counter(misfit.reason for misfit in misfits).items()))


def select_misfits(misfits: Iterable[Misfit], reason: str) -> Sequence[Misfit]:
    """Return the misfits of one reason."""
    return spool((misfit for misfit in misfits if misfit.reason == reason), _count_misfit)


def describe_misfits(misfits: Sequence[Misfit], shown: int = 10) -> str:
    """Return the first misfits as lines that name the rows."""
    lines = [
        f"  row {misfit.row.id} from {misfit.row.source}: {misfit.reason}: {misfit.detail}: "
        f"{misfit.row.question[:60]!r}"
        for misfit in misfits[:shown]
    ]
    more = [f"  and {len(misfits) - shown} more"] if len(misfits) > shown else []
    return "\n".join([*lines, *more])
