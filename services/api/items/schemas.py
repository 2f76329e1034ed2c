"""The body of a request to /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from services.api.fields import UNSUPPORTED, WRONG, Body, JsonObject
from services.api.schemas import Seed, Temperature, TopP, User
from services.api.tools import CallId, FlatChoice, FlatTool, Name, check_arguments, find_tools_problem
from stages.common.params.services import MAX_MESSAGES
from stages.common.tools.schemas import MAX_TOOLS

MAX_METADATA = 16  # as OpenAI has it
KINDS = ("message", "function_call", "function_call_output", "reasoning")
# The fields that a kind of item has besides type, id and status; every item has all of its kind.
FIELDS = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": ("content",),
}
_NOT_STORED = "no response is stored here; send the earlier items in input"


class Part(Body):
    """One piece of an item's text."""

    type: Literal["input_text", "output_text", "reasoning_text"]
    text: str


_Text = str | Annotated[list[Part], Field(fail_fast=True)]


class Item(Body):
    """One item of a conversation: a message, a call, its result, or the thoughts before an answer."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: _Text | None = None
    call_id: CallId | None = None
    name: Name | None = None
    arguments: Annotated[str, AfterValidator(check_arguments)] | None = None
    output: _Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_of_a_known_kind(cls, item: Any) -> Any:
        if not isinstance(item, dict):
            return item
        if (kind := item.get("type", "message")) not in KINDS:
            _refuse("type", f"{str(kind)[:100]!r} is not supported; {', '.join(KINDS)} are")
        for field in ("content", "output"):
            parts = item.get(field)
            for place, part in enumerate(parts if isinstance(parts, list) else ()):
                found = part.get("type") if isinstance(part, dict) else None
                if found not in (wanted := _find_part_types(kind, item.get("role"))):
                    known = " or ".join(map(repr, wanted))
                    _refuse(f"{field}.{place}.type", f"{str(found)[:100]!r} is not supported; {known} is")
        return item

    @model_validator(mode="after")
    def _has_the_fields_of_its_kind(self) -> Item:
        given = {name for name in Item.model_fields if getattr(self, name) is not None}
        given -= {"type", "id", "status"}
        wanted = set(FIELDS[self.type])
        if missing := sorted(wanted - given):
            _call_wrong(missing[0], f"is missing: an item of the type {self.type} needs it")
        if further := sorted(given - wanted):
            _call_wrong(further[0], f"an item of the type {self.type} does not have it")
        if self.type == "reasoning" and isinstance(self.content, str):
            _call_wrong("content", "must be a list of parts of the type reasoning_text")
        return self

    def text(self) -> str:
        """Return the text of a message, of a result or of thoughts in one piece."""
        found = self.output if self.type == "function_call_output" else self.content
        return found if isinstance(found, str) else "".join(part.text for part in found or ())


class TextFormat(Body):
    """The required form of the answer's text; the fields of a schema are its own."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(max_length=64)] = "answer"
    schema_: Annotated[JsonObject | None, Field(alias="schema")] = None
    strict: bool | None = None
    description: str | None = None

    @model_validator(mode="after")
    def _schema_is_there(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None):
            _call_wrong("schema", "type json_schema needs it, and no other type has it")
        return self


class Text(Body):
    """How the answer is written."""

    format: TextFormat | None = None


class Reasoning(Body):
    """How the model thinks, none of which can be set."""


class StreamOptions(Body):
    """Options of a streamed response, of which those that change it are not supported."""


class ResponsesRequest(Body):
    """The body of /v1/responses. Unlike at OpenAI, nothing is stored, and the default temperature is 0."""

    model: str | None = None
    input: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    )
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    tools: Annotated[list[FlatTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: FlatChoice | None = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=MAX_METADATA),
        ]
        | None
    ) = None
    user: User | None = None
    session: User | None = None

    @field_validator("tools", mode="before")
    @classmethod
    def _are_functions(cls, tools: Any) -> Any:
        for place, tool in enumerate(tools if isinstance(tools, list) else ()):
            kind = tool.get("type") if isinstance(tool, dict) else "function"
            if kind != "function":
                _refuse(f"{place}.type", f"{str(kind)[:100]!r} is not supported; only 'function' is")
        return tools

    @model_validator(mode="after")
    def _needs_no_store(self) -> ResponsesRequest:
        if self.store:
            _refuse("store", "true is not supported: no response can be retrieved here; send false")
        for field in ("previous_response_id", "conversation"):
            if getattr(self, field) is not None:
                _refuse(field, f"is not supported: {_NOT_STORED}")
        return self

    @model_validator(mode="after")
    def _tools_fit(self) -> ResponsesRequest:
        if (problem := find_tools_problem(self.tools or (), self.tool_choice)) is not None:
            _call_wrong(*problem)
        return self

    @property
    def text_format(self) -> TextFormat | None:
        """The required form of the text; None for any."""
        return self.text.format if self.text else None


def _find_part_types(kind: str, role: Any) -> tuple[str, ...]:
    if kind == "reasoning":
        return ("reasoning_text",)
    return ("output_text",) if kind == "message" and role == "assistant" else ("input_text",)


def _refuse(field: str, problem: str) -> None:
    raise PydanticCustomError(UNSUPPORTED, "{problem}", {"field": field, "problem": problem})


def _call_wrong(field: str, problem: str) -> None:
    raise PydanticCustomError(WRONG, "{problem}", {"field": field, "problem": problem})
