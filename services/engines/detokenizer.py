"""Token ids into text while they come: whole characters only, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class IncrementalDetokenizer:
    """The text of one answer, built as its tokens arrive.

    All that `push` and `finish` return, put together, is what `stages.common.generation` makes of the same
    ids at once, up to the first stop string. Which one is first depends on the text alone, not on how it was
    cut into steps: it is the one that is complete first, and of two that end together the longer.

    Args:
        tokenizer: the fast tokenizer of transformers.
        stops: strings that end the answer and do not belong to it.
    """

    __slots__ = ("_given", "_held", "_ids", "_stops", "_stream", "_tokenizer", "stopped")

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stops = tuple(stop for stop in stops if stop)
        self._ids: list[int] = []
        self._given = 0  # characters that the stream has given so far
        self._held = ""  # the end of them, which may be the beginning of a stop string
        self.stopped = False  # a stop string came: what follows is not part of the answer

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that is certain after these tokens and was not before."""
        if self.stopped:
            return ""
        backend = self._tokenizer._tokenizer
        pieces = []
        for token in token_ids:
            self._ids.append(token)
            # The stream keeps the bytes of an unfinished character to itself.
            if piece := self._stream.step(backend, token):
                pieces.append(piece)
        text = "".join(pieces)
        self._given += len(text)
        return self._until_stop(text) if self._stops else text

    def finish(self) -> str:
        """Return what was held back: there is no next token."""
        if self.stopped:
            return ""
        whole: str = self._tokenizer.decode(
            self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        text = self._until_stop(whole[self._given :])
        if self.stopped:
            return text
        held, self._held = self._held, ""
        return text + held

    def _until_stop(self, text: str) -> str:
        """Return the text up to a stop string, without an end that may become one."""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text are the beginning of a stop string."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
