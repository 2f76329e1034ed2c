"""A generation request, and the pieces of its answer."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.engines.calls.allowed import AllowedCalls
from services.engines.calls.reading import CallPiece
from services.engines.protocol import Sampling, TokenLogprob
from services.events.turns import write_turns
from services.keys.access import Caller
from stages.common.messages import Message, Tool

_PROMPT_PARAMS = {"/ask": "question", "/v1/responses": "input"}


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A request for an answer, from any route.

    Attributes:
        messages: the conversation; empty for a raw prompt.
        raw: text or token ids to continue as they are; None for a conversation.
        allowed: the tools, and what of them the answer may call; None without tools.
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
    allowed: AllowedCalls | None = None
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
        if self.route in _PROMPT_PARAMS:
            return _PROMPT_PARAMS[self.route]
        return "messages" if self.raw is None else "prompt"

    @property
    def schema_param(self) -> str:
        """The field of the request's body that has the form of the answer, for messages of errors."""
        return "text.format" if self.route == "/v1/responses" else "response_format"

    @property
    def tools(self) -> tuple[Tool, ...]:
        """The tools of the conversation."""
        return self.allowed.tools if self.allowed else ()

    def as_texts(self, decode: Callable[[Sequence[int]], str]) -> list[dict[str, str]]:
        """Return all texts of the prompt under the roles of who wrote them, as the guard reads them.

        The tools are described by the operator, as the system message is.

        Args:
            decode: returns the text that token ids stand for.
        """
        tools = [{"role": "system", "content": tool.text} for tool in self.tools]
        parts = [
            {"role": message.role, "content": text}
            for message in self._turns(decode)
            for text in (message.content, message.reasoning, message.tool_calls and message.answer)
            if text or text is message.content
        ]
        return [*tools, *parts]

    def as_turns(self, decode: Callable[[Sequence[int]], str]) -> list[dict[str, Any]]:
        """Return the prompt as messages, as the event store keeps it."""
        return write_turns(self._turns(decode))

    def _turns(self, decode: Callable[[Sequence[int]], str]) -> Sequence[Message]:
        if self.raw is None:
            return self.messages
        return [Message("user", self.raw if isinstance(self.raw, str) else decode(self.raw))]


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
        reasoning, calls: new thoughts, and new pieces of calls.
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
    reasoning: str = ""
    calls: tuple[CallPiece, ...] = ()


def make_request_id() -> str:
    """Return a unique request id."""
    return f"req_{uuid.uuid4().hex}"
