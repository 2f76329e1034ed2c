"""The turns of a conversation that are learned, and each of them as a row of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from stages.common.messages import LearnedTurns, Message
from stages.common.records import Row, make_row

TURN = "turn"  # the tag of an unrolled row: which question of its conversation it answers, from 1


def list_learned(messages: Sequence[Message], learned_turns: LearnedTurns) -> list[int]:
    """Return the places of the assistant's turns that are learned.

    Args:
        learned_turns: `all` but those of weight 0, `last` only, or those that have a `weight` of 1; a
            conversation without any weight is learned as with `all`.
    """
    turns = [place for place, message in enumerate(messages) if message.role == "assistant"]
    if learned_turns == "last":
        return turns[-1:]
    weighed = [place for place in turns if messages[place].is_learned]
    if learned_turns == "weight" and weighed:
        return weighed
    return [place for place in turns if messages[place].is_learned is not False]


def unroll(rows: Iterable[Row], learned_turns: LearnedTurns) -> Iterator[Row]:
    """Yield one row for each learned turn: the conversation up to it, its answer the last message.

    The turns before it are the reference's. A conversation with one question and one answer is its own row,
    with its id; a row of a longer one has the tag `turn`.
    """
    for row in rows:
        questions = sum(message.role == "user" for message in row.messages)
        learned = list_learned(row.messages, learned_turns)
        if questions == 1 and learned == [len(row.messages) - 1]:
            yield row
            continue
        for place in learned:
            messages = [replace(message, is_learned=None) for message in row.messages[: place + 1]]
            asked = sum(message.role == "user" for message in messages)
            tags = {**row.tags, TURN: str(asked)}
            # Its rejected answer and its rating are about the last turn.
            own = (row.rejected, row.is_desirable) if place == len(row.messages) - 1 else (None, None)
            yield make_row(messages, row.source, row.license, row.group, tags, row.origin, row.tools, *own)
