"""Detect the columns of preferences: two answers to one prompt, or one answer that people rated.

The formats of trl's dataset guide (explicit and implicit prompts, strings and messages), of OpenAI's
preference tuning and of LLaMA-Factory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.common.sources.files.entries import Record
from stages.common.sources.files.turns import is_conversation, parse_list

# Columns of the better and of the worse answer.
PAIRS = (("chosen", "rejected"), ("preferred_output", "non_preferred_output"))
RATING = "label"
WORDS = ("true", "false", "True", "False", "TRUE", "FALSE")  # how a CSV writes a rating


@dataclass(frozen=True, slots=True)
class Preferences:
    """Columns of preferences, as far as they are known; None is detected as in any other file.

    Attributes:
        messages: whole conversations that end with the better answer.
        prompt, completion: of the better answer.
        rejected: the worse answer, or whole conversations that end with it.
        rating: whether the answer is good.
    """

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    rejected: str | None = None
    rating: str | None = None


def find_preferences(
    records: Sequence[Record], names: Mapping[str, str], chat_names: Sequence[str]
) -> Preferences | None:
    """Return the columns of preferences of a file; None where it has none.

    Args:
        names: the columns by their plain names.
        chat_names: plain names of columns that are conversations.
    """
    conversations = [names[name] for name in chat_names if name in names and _has_turns(records, names[name])]
    for better, worse in PAIRS:
        if better in names and worse in names:
            column, rejected = names[better], names[worse]
            if _has_turns(records, column, with_question=True):
                return Preferences(messages=column, rejected=rejected)
            return Preferences(None, next(iter(conversations), None), column, rejected)
    rating = names.get(RATING)
    marks = [record[rating] for record in records if record.get(rating) not in (None, "")] if rating else []
    is_rated = conversations or names.keys() >= {"prompt", "completion"}
    if marks and is_rated and all(isinstance(mark, bool) or mark in WORDS for mark in marks):
        return Preferences(rating=rating)
    return None


def _has_turns(records: Sequence[Record], column: str, with_question: bool = False) -> bool:
    """Return whether most records have a conversation in a column, with a question if asked for."""
    found = [parse_list(record[column]) for record in records if is_conversation(record.get(column))]
    if with_question:
        found = [turns for turns in found if any(map(_is_question, turns))]
    return 2 * len(found) >= max(1, len(records))


def _is_question(turn: Any) -> bool:
    return isinstance(turn, Mapping) and turn.get("role", turn.get("from")) in ("user", "human")
