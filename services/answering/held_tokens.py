"""Hold tokens back until their text is released: none after a stop string, and none that may begin one."""

from __future__ import annotations

from dataclasses import replace

from services.engines.protocol import Step, TokenLogprob


class HeldTokens:
    """The tokens of an answer whose text is still held back."""

    __slots__ = ("_ids", "_logprobs", "_released")

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._released = 0

    def release(self, step: Step, count: int) -> Step:
        """Return a step with the tokens that are new among the first `count` of the answer."""
        self._ids += step.token_ids
        self._logprobs += step.logprobs
        new = count - self._released
        self._released = count
        released = replace(step, token_ids=tuple(self._ids[:new]), logprobs=tuple(self._logprobs[:new]))
        del self._ids[:new], self._logprobs[:new]
        return released
