"""Request bodies, and the body of the native answer."""

from __future__ import annotations

from types import NoneType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from services.api.fields import UNSUPPORTED, WRONG, Body, JsonObject, describe_unsupported
from services.api.tools import CallId, CallOfTool, FunctionTool, ToolChoice, find_tools_problem
from stages.common.params.services import MAX_MESSAGES
from stages.common.tools.schemas import MAX_TOOLS

MAX_STOPS = 4  # as OpenAI has it
MAX_ALTERNATIVES = 20
Temperature = Annotated[float, Field(ge=0.0, le=2.0)]
TopP = Annotated[float, Field(gt=0.0, le=1.0)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
User = Annotated[str, Field(max_length=256)]
_NO_TOKENS = "0 is only possible with echo, which repeats the prompt"


def check_prompts(value: Any) -> Any:
    """Return a value that is a text or token ids, or a list of these; reject any other."""
    if _is_prompt(value) or (isinstance(value, list) and value and all(map(_is_prompt, value))):
        return value
    raise ValueError("must be a text or a list of token ids, or a list of these, none of them empty")


def _is_prompt(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(type(number) is int for number in value)
    return isinstance(value, str) and bool(value)


_Prompt = Annotated[str, Field(min_length=1)] | Annotated[list[int], Field(min_length=1, fail_fast=True)]
Prompts = Annotated[_Prompt | Annotated[list[_Prompt], Field(fail_fast=True)], BeforeValidator(check_prompts)]


def list_prompts(value: Any) -> list[str | tuple[int, ...]]:
    """Return one or several prompts, as a request has them, as a list."""
    several = isinstance(value, list) and not isinstance(value[0], int)
    return [one if isinstance(one, str) else tuple(one) for one in (value if several else [value])]


class TextPart(Body):
    """One piece of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """One turn of a conversation; `developer` is OpenAI's newer word for `system`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    tool_calls: Annotated[list[CallOfTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_call_id: CallId | None = None
    reasoning_content: str | None = None
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _is_text(cls, content: Any) -> Any:
        if not isinstance(content, (str, list, NoneType)):
            raise ValueError("must be a text or a list of parts of type text")
        for place, part in enumerate(content if isinstance(content, list) else ()):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text":
                context = {"field": f"{place}.type", "problem": f"{kind!r} is not supported; only 'text' is"}
                raise PydanticCustomError(UNSUPPORTED, "{problem}", context)
        return content

    @model_validator(mode="after")
    def _fits_its_role(self) -> ChatMessage:
        if self.name is not None and self.role != "tool":  # there it repeats what the call has
            context = {"field": "name", "problem": describe_unsupported("name", ())}
            raise PydanticCustomError(UNSUPPORTED, "{problem}", context)
        if (found := self._find_problem()) is not None:
            field, problem = found
            raise PydanticCustomError(WRONG, "{problem}", {"field": field, "problem": problem})
        return self

    def _find_problem(self) -> tuple[str, str] | None:
        if self.tool_calls and self.role != "assistant":
            return "tool_calls", "only an assistant calls tools"
        if self.reasoning_content is not None and self.role != "assistant":
            return "reasoning_content", "only an assistant has thoughts"
        if self.tool_call_id is not None and self.role != "tool":
            return "tool_call_id", "only a message of the role tool has it"
        if self.tool_call_id is None and self.role == "tool":
            return "tool_call_id", "is missing: a message of the role tool names the call whose result it is"
        if self.content is None and not self.tool_calls:
            return "content", "is missing or null, and every message needs a text, or calls of tools"
        if self.role == "assistant" and not self.tool_calls and not self.text().strip():
            return "content", "is empty, and a turn of the assistant needs a text or calls; fix: leave it out"
        ids = [call.id for call in self.tool_calls or ()]
        if len(set(ids)) < len(ids):
            return "tool_calls", "two calls have one id"
        return None

    def text(self) -> str:
        """Return the content in one piece."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class JsonSchema(Body):
    """A named JSON schema."""

    name: Annotated[str, Field(max_length=64)] = "answer"
    schema_: Annotated[JsonObject, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Body):
    """The required form of the answer: any text, a JSON object, or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_is_there(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("type json_schema needs the field json_schema, and no other type has it")
        return self


class StreamOptions(Body):
    """Options of a streamed response."""

    include_usage: bool | None = False


class _Sampled(Body):
    """Fields of both kinds of completion."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    response_format: ResponseFormat | None = None
    user: User | None = None
    session: User | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _few_stops(cls, stop: Any) -> Any:
        stops = stop if isinstance(stop, list) else [] if stop is None else [stop]
        if len(stops) > MAX_STOPS or not all(isinstance(one, str) and one for one in stops):
            raise ValueError(f"must be a string or at most {MAX_STOPS} strings, none of them empty")
        return stop

    def stops(self) -> tuple[str, ...]:
        """Return the stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def wants_usage(self) -> bool:
        """Return whether a stream ends with a chunk of its own for the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(_Sampled):
    """The body of /v1/chat/completions. Unlike at OpenAI, the default temperature is 0."""

    # The first error is context, and a body has room for a hundred thousands.
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _tools_fit(self) -> ChatRequest:
        problem = find_tools_problem(self.tools or (), self.tool_choice)
        if problem is None and self.stop and self.tools and self.tool_choice != "none" and self.logprobs:
            problem = (
                "logprobs",
                "with stop and tools is not supported; leave one out, or send tool_choice: none",
            )
        if problem is not None:
            field, reason = problem
            raise PydanticCustomError(WRONG, "{problem}", {"field": field, "problem": reason})
        return self

    @model_validator(mode="after")
    def _limits_agree(self) -> ChatRequest:
        newer, older = self.max_completion_tokens, self.max_tokens
        if None not in (newer, older) and newer != older:
            problem = f"is {newer}, and max_tokens, its older name, is {older}; send one of them"
            context = {"field": "max_completion_tokens", "problem": problem}
            raise PydanticCustomError(WRONG, "{problem}", context)
        return self

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:  # 0 asks for nothing
            raise ValueError("top_logprobs needs logprobs: true")
        return self


class CompletionRequest(_Sampled):
    """The body of /v1/completions: raw text or token ids, without a chat template."""

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _asks_for_something(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError(
                UNSUPPORTED, "{problem}", {"field": "max_tokens", "problem": _NO_TOKENS}
            )
        return self

    def prompts(self) -> list[str | tuple[int, ...]]:
        """Return the prompts."""
        return list_prompts(self.prompt)


class FeedbackRequest(Body):
    """The body of /v1/feedback: feedback on an answer."""

    request_id: Annotated[str, Field(min_length=1, max_length=64)]
    thumb: Literal["up", "down"] | None = None
    correction: Annotated[str, Field(max_length=20_000)] | None = None
    comment: Annotated[str, Field(max_length=4_000)] | None = None

    @model_validator(mode="after")
    def _is_not_empty(self) -> FeedbackRequest:
        if self.thumb is None and not self.correction and not self.comment:
            raise ValueError("give a thumb, a correction or a comment")
        return self


class Answer(BaseModel):
    """The answer of the native endpoint.

    Attributes:
        text: as generated.
        parsed: the text as JSON; null for text tasks, or if it is not JSON.
        valid: whether it fits the schema of the training answers; null without a schema.
        version: content hash of the model that answered.
        mean_logprob: mean log-probability of its tokens, in nats; null if the engine has none.
    """

    request_id: str
    text: str
    parsed: Any = None
    valid: bool | None
    model: str
    version: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    mean_logprob: float | None
