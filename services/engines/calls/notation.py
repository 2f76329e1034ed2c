"""What a model writes around thoughts and calls, read from its tokenizer and chat template."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from services.engines.calls.grammar import Marks
from services.engines.calls.reading import Thoughts
from stages.common.chat.calls import read_call_format
from stages.common.chat.template import read_answer_frame, thinks

_known: WeakKeyDictionary[Any, tuple[tuple[str, int], ...]] = WeakKeyDictionary()


def read_marks(tokenizer: Any) -> Marks:
    """Return how calls are written, and what a grammar needs to hold them.

    Raises:
        InputError: the chat template has no tools.
    """
    frame = read_answer_frame(tokenizer)
    return Marks(
        read_call_format(tokenizer), frame.thought_start, frame.thought_end or "", _read_added(tokenizer)
    )


def read_thoughts(tokenizer: Any) -> Thoughts | None:
    """Return what is around the thoughts of a model; None where it does not think."""
    if not tokenizer.chat_template or not thinks(tokenizer):
        return None
    frame = read_answer_frame(tokenizer)
    return None if frame.thought_end is None else Thoughts(frame.thought_start, frame.thought_end)


def _read_added(tokenizer: Any) -> tuple[tuple[str, int], ...]:
    """Return the added tokens with their ids, but for blanks."""
    if tokenizer not in _known:
        added = tokenizer.added_tokens_decoder.items()
        _known[tokenizer] = tuple((token.content, number) for number, token in added if token.content.strip())
    return _known[tokenizer]
