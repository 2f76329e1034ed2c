"""Incremental detokenization with stop strings."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from stages.common.chat.control_tokens import list_special_ids


class StopFinder:
    """Gives the text of one answer up to its first stop string, and holds back an end that may begin one.

    The first stop string is the one that is complete first, the longest if several end together.

    Args:
        stops: strings that end the answer and are not part of it.
    """

    __slots__ = ("_held", "_stops", "stopped")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped = False  # a stop string was found

    def __bool__(self) -> bool:
        return bool(self._stops)

    def push(self, text: str) -> str:
        """Add text; return what is new and final."""
        if not self._stops:
            return text
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        """Return the text held back; call where no text follows."""
        held, self._held = self._held, ""
        return held


class IncrementalDetokenizer:
    """Decodes the tokens of one answer as they arrive, in whole characters, up to the first stop string.

    The texts that `push` and `finish` return, concatenated, equal decoding all ids at once and cutting at the
    first stop string. The first stop string is the one that is complete first, the longest if several end
    together, however the ids are split into steps.

    Args:
        tokenizer: the fast tokenizer of transformers.
        stops: strings that end the answer and are not part of it.
        shown: special tokens that are text; all others are left out.
    """

    __slots__ = (
        "_begins",
        "_decoded",
        "_finished",
        "_given",
        "_hidden",
        "_ids",
        "_skips_special",
        "_stops",
        "_stream",
        "_tokenizer",
    )

    def __init__(
        self, tokenizer: Any, stops: Sequence[str] = (), shown: frozenset[int] = frozenset()
    ) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        # Where some are shown, the others are left out here.
        self._hidden = list_special_ids(tokenizer) - shown if shown else frozenset()
        self._skips_special = not shown
        self._stream = DecodeStream(skip_special_tokens=self._skips_special)
        self._stops = StopFinder(stops)
        self._ids: list[int] = []
        self._begins: list[int] = []  # characters decoded before each token
        self._decoded = 0  # characters decoded so far
        self._given = 0  # characters returned so far
        self._finished = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stops.stopped

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens; return the new text that is final."""
        if self.stopped:
            return ""
        backend = self._tokenizer._tokenizer
        pieces = []
        for token in token_ids:
            self._ids.append(token)
            self._begins.append(self._decoded)
            if token in self._hidden:
                continue
            # The stream holds back the bytes of incomplete characters.
            if piece := self._stream.step(backend, token):
                pieces.append(piece)
                self._decoded += len(piece)
        text = "".join(pieces)
        return self._give(self._stops.push(text))

    def finish(self) -> str:
        """Return the text held back; call after the last token."""
        if self.stopped:
            return ""
        whole: str = self._tokenizer.decode(
            [token for token in self._ids if token not in self._hidden],
            skip_special_tokens=self._skips_special,
            clean_up_tokenization_spaces=False,
        )
        text = self._stops.push(whole[self._decoded :])
        if self.stopped:
            return self._give(text)
        self._finished = True
        return self._give(text + self._stops.finish())

    def count_released(self) -> int:
        """Return how many tokens belong to the text returned so far: none that begins behind it.

        Without stop strings, and after `finish` without one found, these are all.
        """
        if not self._stops or self._finished:
            return len(self._ids)
        return bisect_left(self._begins, self._given)

    def _give(self, text: str) -> str:
        self._given += len(text)
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of a text that begins a stop string."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
