"""A generation request, and the pieces of its answer."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from services.engines.protocol import Sampling, TokenLogprob
from services.keys.access import Caller
from stages.common.messages import Message


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A request for an answer, from any route.

    Attributes:
        messages: the conversation; empty for a raw prompt.
        raw: text or token ids to continue as they are; None for a conversation.
        caller: the sender, as authenticated.
        model: the requested model; None for the default.
        user, session: the end user and the conversation, as given by the sender.
        echo: repeat the prompt in front of the answer.
        shadow_of: id of the request that this one repeats on the challenger.
        received_at: unix time, s.
    """

    request_id: str
    route: str
    messages: tuple[Message, ...]
    sampling: Sampling
    caller: Caller
    raw: str | tuple[int, ...] | None = None
    stops: tuple[str, ...] = ()
    model: str | None = None
    user: str | None = None
    session: str | None = None
    echo: bool = False
    shadow_of: str | None = None
    received_at: float = field(default_factory=time.time)

    @property
    def assignment_key(self) -> str:
        """What assigns the request to champion or challenger: the user, else the session, else the caller."""
        return self.user or self.session or self.caller.client

    @property
    def prompt_param(self) -> str:
        """The field of the request's body that has the prompt, for messages of errors."""
        if self.route == "/ask":
            return "question"
        return "messages" if self.raw is None else "prompt"

    def as_messages(self, decode: Callable[[Sequence[int]], str]) -> list[dict[str, str]]:
        """Return the prompt as messages, as the guard and the event store read it.

        Args:
            decode: returns the text that token ids stand for.
        """
        if self.raw is not None:
            text = self.raw if isinstance(self.raw, str) else decode(self.raw)
            return [{"role": "user", "content": text}]
        return [{"role": message.role, "content": message.content} for message in self.messages]


@dataclass(frozen=True, slots=True)
class Usage:
    """Numbers of prompt tokens and generated tokens."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Echo:
    """The prompt, as it is repeated in front of the answer.

    Attributes:
        logprobs: of the second token and those after it; None where they are not wanted.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of an answer; the last one has a finish reason and the usage.

    Attributes:
        echo: the prompt, on the first one, if it is to be repeated.
        end: log-probability of the end-of-turn token, on a last one that has it.
    """

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    usage: Usage | None = None
    valid: bool | None = None
    mean_logprob: float | None = None
    echo: Echo | None = None
    end: TokenLogprob | None = None


def make_request_id() -> str:
    """Return a unique request id."""
    return f"req_{uuid.uuid4().hex}"
