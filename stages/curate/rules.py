"""The rules for one row: each is a function that returns None (keep) or a `Rejection`."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from stages.common.chat.turns import list_learned
from stages.common.messages import LearnedTurns
from stages.common.privacy.personal_data import find_kind
from stages.common.privacy.row_texts import list_private_texts
from stages.common.records import Row
from stages.common.similarity.compared_text import has_visible
from stages.common.task.protocol import Task

PERSONAL = "personal_"  # before the kind, in the reason of a row with personal data or a secret
OWN_PROMPT = "the message of the system"
MIN_CHARS_TO_JUDGE = 10  # a shorter question may be all signs: ":-)"


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a row is rejected: a word to count by, and a detail."""

    reason: str
    detail: str


Rule = Callable[[Row], Rejection | None]


def limit_question_length(min_chars: int, max_chars: int) -> Rule:
    """Return the rule that rejects shorter and longer questions."""

    def rule(row: Row) -> Rejection | None:
        length = len(row.question.strip())
        if not has_visible(row.question):
            return Rejection("empty_question", "no visible character")
        if length < min_chars:
            return Rejection("short_question", f"{length} characters, at least {min_chars} required")
        if length > max_chars:
            return Rejection("long_question", f"{length} characters, at most {max_chars} required")
        return None

    return rule


def limit_answer_length(max_chars: int, learned_turns: LearnedTurns = "last") -> Rule:
    """Return the rule that rejects rows with a learned answer that is empty or longer."""

    def rule(row: Row) -> Rejection | None:
        for place, answer in _list_answers(row, learned_turns):
            length = len(answer.strip())
            if not has_visible(answer):
                return Rejection("empty_answer", f"{place}no visible character")
            if length > max_chars:
                return Rejection("long_answer", f"{place}{length} characters, at most {max_chars} required")
        length = len(row.rejected.answer.strip()) if row.rejected else 0
        if length > max_chars:
            return Rejection(
                "long_answer", f"the rejected answer: {length} characters, at most {max_chars} required"
            )
        return None

    return rule


def require_difference(task: Task) -> Rule:
    """Return the rule that rejects pairs whose two answers mean the same: neither is the better one."""

    def rule(row: Row) -> Rejection | None:
        if row.rejected and task.canonical(row.rejected.answer) == task.canonical(row.answer):
            return Rejection("equal_answers", "the rejected answer means the same as the answer")
        return None

    return rule


def check_answer(task: Task, learned_turns: LearnedTurns = "last") -> Rule:
    """Return the rule that rejects rows with a learned answer that is not valid for the task."""

    def rule(row: Row) -> Rejection | None:
        for place, answer in _list_answers(row, learned_turns):
            if problem := task.find_problem(answer):
                return Rejection("invalid_answer", f"{place}{problem}")
        return None

    return rule


def _list_answers(row: Row, learned_turns: LearnedTurns) -> Iterator[tuple[str, str]]:
    """Yield each learned answer of a row, with its place for the detail; that of the last one is empty."""
    last = len(row.messages) - 1
    for place in list_learned(row.messages, learned_turns):
        yield "" if place == last else f"message {place + 1}: ", row.messages[place].answer


def limit_repetition(max_characters: int | None, max_words: int | None) -> Rule:
    """Return the rule that rejects a letter or a word repeated many times; None: any number.

    Signs and digits may repeat: rules in Markdown, rows of a matrix, emoji.
    """
    letters = re.compile(rf"([^\W\d_])\1{{{max_characters},}}") if max_characters is not None else None

    def rule(row: Row) -> Rejection | None:
        for role, text in list_texts(row):
            if letters and letters.search(text):
                return Rejection(
                    "repetition", f"one letter more than {max_characters} times in a row ({role})"
                )
            if max_words is not None and (word := _find_repeated_word(text, max_words)):
                return Rejection("repetition", f"{word[:20]!r} more than {max_words} times in a row ({role})")
        return None

    return rule


def _find_repeated_word(text: str, limit: int) -> str | None:
    run, last = 0, ""
    for word in text.casefold().split():
        run = run + 1 if word == last else 1
        last = word
        if run > limit and any(map(str.isalpha, word)):
            return word
    return None


def require_text(min_share: float) -> Rule:
    """Return the rule that rejects questions with a smaller share of letters, digits and pictures (emoji)."""

    def rule(row: Row) -> Rejection | None:
        visible = "".join(row.question.split())
        if (
            visible.isalnum()
            or len(visible) < MIN_CHARS_TO_JUDGE
            or sum(map(str.isalnum, visible)) >= min_share * len(visible)
        ):
            return None
        share = sum(map(_is_text, visible)) / len(visible)
        if share >= min_share:
            return None
        return Rejection(
            "mostly_not_text", f"{share:.0%} letters and digits, at least {min_share:.0%} required"
        )

    return rule


def _is_text(character: str) -> bool:
    kind = unicodedata.category(character)
    return kind[0] in "LMN" or (kind == "So" and character != "\ufffd")  # a sign of a lost character


def find_personal_data(kinds: Sequence[str], system_prompt: str | None = None) -> Rule:
    """Return the rule that rejects rows with personal data or secrets of `kinds`; the detail repeats none.

    Args:
        system_prompt: the operator's own, which is not looked at.
    """
    own = system_prompt.strip() if system_prompt is not None else None

    def rule(row: Row) -> Rejection | None:
        for place, text in list_private_texts(row):
            if text.strip() == own and place == OWN_PROMPT:
                continue
            kind = find_cached(text) if place == "the description of a tool" else find_kind(kinds, text)
            if kind is not None:
                return Rejection(f"{PERSONAL}{kind}", f"in {place}")
        return None

    @lru_cache(maxsize=4096)  # many rows have the same tools
    def find_cached(text: str) -> str | None:
        return find_kind(kinds, text)

    return rule


def list_texts(row: Row) -> Iterable[tuple[str, str]]:
    """Yield role and text of each message of users and assistant: not the system's, and no results."""
    return ((m.role, m.content) for m in row.messages if m.role not in ("system", "tool"))
