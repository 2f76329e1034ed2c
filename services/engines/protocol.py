"""The interface of an engine: token ids in, generated token ids out, many requests at once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]
# Below these, float32 (and OpenVINO) makes 0 or infinity of a number; the likeliest token is drawn anyway.
MIN_TEMPERATURE = 1e-5
MIN_TOP_P = 1e-6


class EngineError(RuntimeError):
    """The engine cannot finish an answer: it failed, or it was closed."""


class QueueFull(EngineError):
    """The queue of waiting requests is full; raised before the first step."""


class SchemaUnsupported(ValueError):
    """The schema cannot be compiled, no answer satisfies it, or its grammar outgrows its limits."""


class Unsupported(ValueError):
    """The engine has no log-probabilities or no vectors of prompts; raised before the first step."""


class ContextOverflow(ValueError):
    """The prompt leaves no room for a token in the context; raised before the first step."""


@dataclass(frozen=True, slots=True)
class CallForm:
    """The answers that `Sampling.grammar` allows, in parts, for engines with another form of grammars.

    Attributes:
        mode: `auto`: text or calls · `required`: calls · `none`: text.
        thought: what is before and after the thoughts of a model that thinks; None for others.
        opener, separator, closer: what is before, between and after calls; no separator: one call.
        tools: of each tool what is before the arguments of a call, their JSON schema, and what is after them.
        has_text: whether text may come before calls.
        json_schema, choices: what an answer without calls is held to; None and empty: any text.
    """

    mode: str
    thought: tuple[str, str] | None
    opener: str
    separator: str
    closer: str
    tools: tuple[tuple[str, str, str], ...]
    has_text: bool
    json_schema: str | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters of one request.

    Attributes:
        max_tokens: length at which the answer is cut; it may be cut earlier at the end of the context.
        temperature: 0 is greedy, and anything below 1e-5 is 0.
        top_p: sample from the likeliest tokens that reach this probability together; at least 1e-6.
        seed: of 64 bits, with or without sign; equal ones give equal answers on the same engine and machine.
        logprobs: number of alternatives to report with each token; None for no log-probabilities.
        json_schema: constrains decoding to JSON that fits this schema; `{}` is any JSON value.
        choices: constrains decoding to one of these texts; not together with `json_schema`.
        grammar: constrains decoding to a grammar in llguidance's form of Lark; not with the two above.
        calls: the same as `grammar`, in parts; None where it is no grammar of calls, or they have ids.
        prompt_logprobs: report the prompt's tokens too, with the number of alternatives of `logprobs`.
        embeds_prompt: report the mean of the last hidden states of the prompt's tokens.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logprobs: int | None = None
    json_schema: str | None = None
    choices: tuple[str, ...] = ()
    grammar: str | None = None
    calls: CallForm | None = None
    prompt_logprobs: bool = False
    embeds_prompt: bool = False

    @property
    def is_constrained(self) -> bool:
        """Whether a grammar holds the answer."""
        return self.grammar is not None or self.json_schema is not None or bool(self.choices)

    def __post_init__(self) -> None:
        if self.temperature < MIN_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)
        object.__setattr__(self, "top_p", max(self.top_p, MIN_TOP_P))


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A generated token's log-probability in nats, and the likeliest alternatives as (token id, nats)."""

    token_id: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """The tokens that an engine has generated since the last step.

    Attributes:
        token_ids: new tokens, without the end-of-turn token.
        finish_reason: set on the last step only.
        logprobs: one per token if requested, else empty.
        queue_s: time in the queue; set on the first step only.
        prompt_logprobs: of the prompt's tokens from the second, if requested; on the first step only.
        end: log-probability of the end-of-turn token, on a last step that has one.
        embedding: of the prompt, if requested; on the first step only.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    queue_s: float = 0.0
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    end: TokenLogprob | None = None
    embedding: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """Numbers of queued and of running requests."""

    waiting: int
    running: int


class Engine(Protocol):
    """Generates answers to many requests at once.

    Attributes:
        name: `paged`, `openvino`, `transformers` or `vllm`.
        context_tokens: limit of prompt and answer together.
        max_running: sequences decoded together.
    """

    name: str
    context_tokens: int
    max_running: int

    @property
    def broken(self) -> str | None:
        """Why the engine accepts no more requests; None while it works."""
        ...

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncIterator[Step]:
        """Generate an answer to a prompt; the last step has a finish reason.

        An async generator: closing it, or cancelling its reader, ends the sequence within one step.

        Raises:
            ContextOverflow, QueueFull: before the first step.
            SchemaUnsupported, EngineError: at any time. Only this answer ends, unless `broken` is set.
        """
        ...

    def load(self) -> Load:
        """Return the numbers of queued and running requests."""
        ...

    def close(self) -> None:
        """Stop the engine; callers that still wait get EngineError."""
        ...
