"""Read the worse answer of a record, and the rating of its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stages.common.messages import Message
from stages.common.sources.files.entries import BadRow, Record, shorten
from stages.common.sources.files.messages import read_answer_turns
from stages.common.sources.files.shapes import Shape

RATINGS = {"true": True, "false": False, "1": True, "0": False}


def read_rejected(
    fields: Record, shape: Shape, messages: Sequence[Message], forms: set[str]
) -> Message | None:
    """Return the answer of a record that is worse than the last of its messages; None where it has none.

    Raises:
        BadRow: it is no answer, or whole conversations differ before their answers.
    """
    value = fields.get(shape.rejected) if shape.rejected else None
    if value in (None, "", [], {}):
        return None
    name = shape.rejected or ""
    turns = [turn.message for turn in read_answer_turns(name, value, shape, forms)]
    if not turns or turns[-1].role != "assistant":
        raise BadRow("wrong_rejected", f"{name!r} does not end with an answer of the assistant")
    before = [message for message in turns[:-1] if message.role != "system"]
    own = [message for message in messages[:-1] if message.role != "system"]
    if before and before != own:
        raise BadRow("wrong_rejected", f"{name!r} is an answer to another conversation")
    return turns[-1]


def read_rating(value: Any) -> bool | None:
    """Return whether an answer is good; None where no one rated it.

    Raises:
        BadRow: it is no rating.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    known = RATINGS.get(str(value).strip().casefold())
    if known is None:
        raise BadRow("wrong_rating", f"a rating is true or false: {shorten(value)}")
    return known
