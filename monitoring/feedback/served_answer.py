"""The answer that a model served, as far as feedback on it can be learned from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stages.common.messages import is_malformed
from stages.common.privacy.personal_data import RECOGNISERS, holds
from stages.common.task.protocol import Task

PLACEHOLDERS = tuple(f"[{kind}]" for kind in RECOGNISERS)  # what the event store writes over personal data
ENDED = ("stop", "tool_calls")  # by the model itself


def is_whole(exchange: Mapping[str, Any]) -> bool:
    """Return whether the model ended its answer by itself: what is cut off shows no end of turn."""
    return (
        exchange["status"] == 200
        and exchange["answer"] is not None
        and bool(exchange["answer"].strip())
        and exchange["finish_reason"] in ENDED
    )


def find_rejected(
    exchange: Mapping[str, Any], correction: str, answers: Task, max_chars: int, private: Sequence[str]
) -> str | None:
    """Return the answer that a correction replaces, as the worse one of a pair; None where it is of no use.

    It may be invalid for the task: that can be why it was corrected. It comes without what the model thought
    before it, as the correction does: else the pair would teach not to think. What would not be learned as an
    answer for its private data or its length is not learned as a bad one either.
    """
    if not is_whole(exchange):
        return None
    answer: str = exchange["answer"]
    is_private = any(mark in answer for mark in PLACEHOLDERS) or any(holds(kind, answer) for kind in private)
    if is_private or len(answer) > max_chars or is_malformed(answer.strip()) or not is_unicode(answer):
        return None
    return None if answers.canonical(answer) == answers.canonical(correction) else answer


def find_error(answer: str | None, label: str, answers: Task) -> str | None:
    """Return the worst type of error that a label corrects, None if the answer was right or is not known."""
    errors = answers.find_errors(answer, label) if answer is not None else {}
    return min(errors, key=answers.error_types.index) if errors else None


def is_unicode(text: str) -> bool:
    """Return whether a text can be written as UTF-8: JSON may escape half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
