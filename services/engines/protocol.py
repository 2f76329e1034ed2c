"""What serving asks of an engine, whatever computes: token ids in, new token ids out, many at once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]


class EngineError(RuntimeError):
    """Raised to callers whose answer an engine can no longer write: it broke, or it was closed."""


class QueueFull(EngineError):
    """Raised before the first step if the engine takes no more waiting requests."""


class SchemaUnsupported(ValueError):
    """Raised before the first step for a schema that cannot be compiled, or that no answer satisfies."""


class ContextOverflow(ValueError):
    """Raised before the first step for a prompt that leaves no room for a token in the context."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one answer is to be written.

    Attributes:
        max_tokens: where the answer is cut; the engine cuts earlier where the context ends.
        temperature: 0 takes the likeliest token each time.
        top_p: draw among the likeliest tokens that together have this probability.
        seed: equal seeds draw equal answers, on the same engine and machine.
        logprobs: alternatives to report beside each token, 0 for none; None for no log-probabilities.
        json_schema: the answer is JSON that fits this schema, held during decoding; `{}` is any JSON value.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logprobs: int | None = None
    json_schema: str | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A written token's log-probability in nats, and the likeliest alternatives as (token id, nats)."""

    token_id: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """What an engine has written since the last step.

    Attributes:
        token_ids: new tokens, without the end-of-turn token.
        finish_reason: set on the last step only.
        logprobs: one for each token if they were asked for, else empty.
        queue_s: how long the request waited for a place; set on the first step only.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    queue_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Load:
    """Requests that wait for a place, and requests being written."""

    waiting: int
    running: int


class Engine(Protocol):
    """Something that writes answers, many at once.

    Attributes:
        name: `openvino`, `transformers` or `vllm`.
        context_tokens: prompt and answer together.
        max_running: sequences decoded together.
        broken: why it takes no more requests; None while it works.
    """

    name: str
    context_tokens: int
    max_running: int

    @property
    def broken(self) -> str | None:
        """Return why the engine takes no more requests, or None."""
        ...

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncIterator[Step]:
        """Write an answer to a prompt; the last step has a finish reason.

        An async generator: closing it, or cancelling who reads it, ends the sequence within one step.

        Raises:
            SchemaUnsupported, ContextOverflow, QueueFull: before the first step.
            EngineError: at any time.
        """
        ...

    def load(self) -> Load:
        """Return how many requests wait and run."""
        ...

    def close(self) -> None:
        """End the engine's thread; callers that still wait get EngineError."""
        ...
