"""The parts of request bodies that describe tools, and calls of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from services.api.fields import UNSUPPORTED, Body, JsonObject, check_depth, find_broken_text
from services.engines.calls.allowed import AllowedCalls
from stages.common.messages import Tool, ToolCall, format_arguments, read_strict_json
from stages.common.tools.canonical import FUNCTION_KEYS, write_tool
from stages.common.tools.schemas import NAME, find_name_problem

CallId = Annotated[str, Field(min_length=1, max_length=256)]


def check_name(name: str) -> str:
    """Return the name of a tool.

    Raises:
        ValueError: no tool can have it, with one that it can have.
    """
    if problem := find_name_problem(name):
        raise ValueError(problem)
    return name


Name = Annotated[str, AfterValidator(check_name), Field(json_schema_extra={"pattern": f"^{NAME.pattern}$"})]


def check_arguments(arguments: str) -> str:
    """Return the arguments of a call, those of an empty text as an empty object.

    Raises:
        ValueError: they are not the text of a JSON object, a key is given twice, it is nested too deeply, or
            a text in it is not valid Unicode.
    """
    try:
        value = read_strict_json(arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"must be the text of a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("must be the text of a JSON object")
    check_depth(value)
    if (path := find_broken_text(value)) is not None:  # written as an escape, which is valid in the text
        where = f" at {path!r}" if path else ""
        raise ValueError(f"has half of a surrogate pair{where}, which is not valid Unicode")
    format_arguments(value)  # a number like 1e999 is none that JSON can write
    return arguments or "{}"


class FunctionCall(Body):
    """The function that was called, its arguments as the text of a JSON object."""

    name: Name
    arguments: Annotated[str, AfterValidator(check_arguments)]


class CallOfTool(Body):
    """A call that an assistant made in an earlier turn."""

    id: CallId
    type: Literal["function"] = "function"
    function: FunctionCall

    def read(self) -> ToolCall:
        """Return the call."""
        return ToolCall(self.function.name, self.function.arguments, self.id)


class Function(Body):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None

    def read(self) -> Tool:
        """Return the tool as the prompt has it: `strict` changes nothing, as all arguments are held."""
        return write_tool({key: getattr(self, key) for key in FUNCTION_KEYS})


class FunctionTool(Body):
    """A tool of the only type there is: a function."""

    type: Literal["function"]
    function: Function


class FlatTool(Function):
    """A tool as the Responses API has it: the fields of the function are its own."""

    type: Literal["function"]


class FunctionName(Body):
    """The name of a function."""

    name: Name


class NamedTool(Body):
    """The one function that the answer is to call."""

    type: Literal["function"]
    function: FunctionName


class FlatNamedTool(FunctionName):
    """The one function that the answer is to call, as the Responses API has it."""

    type: Literal["function"]


def check_choice(choice: Any) -> Any:
    """Return a choice of tools; reject one of a type that is not known."""
    kind = choice.get("type") if isinstance(choice, dict) else "function"
    if kind != "function":
        problem = f"{str(kind)[:100]!r} is not supported; only 'function' is"
        raise PydanticCustomError(UNSUPPORTED, "{problem}", {"field": "type", "problem": problem})
    return choice


_Mode = Literal["none", "auto", "required"]
ToolChoice = Annotated[_Mode | NamedTool, BeforeValidator(check_choice)]
FlatChoice = Annotated[_Mode | FlatNamedTool, BeforeValidator(check_choice)]
AnyTool = FunctionTool | FlatTool
AnyChoice = _Mode | NamedTool | FlatNamedTool


def read_allowed(
    tools: Sequence[AnyTool], choice: AnyChoice | None, is_parallel: bool | None
) -> AllowedCalls | None:
    """Return what the answer may call; None for a request without tools."""
    if not tools:
        return None
    read = tuple(_find_function(tool).read() for tool in tools)
    parallel = is_parallel is not False
    if isinstance(choice, NamedTool | FlatNamedTool):
        return AllowedCalls(read, "required", _find_function(choice).name, parallel)
    return AllowedCalls(read, choice or "auto", None, parallel)


def find_tools_problem(tools: Sequence[AnyTool], choice: AnyChoice | None) -> tuple[str, str] | None:
    """Return the field of a request that is wrong and why, or None."""
    names: set[str] = set()
    for place, tool in enumerate(tools):
        name = _find_function(tool).name
        if name in names:
            path = "function.name" if isinstance(tool, FunctionTool) else "name"
            return f"tools.{place}.{path}", f"{name!r} is the name of an earlier tool"
        names.add(name)
    if choice == "required" and not tools:
        return "tool_choice", "there are no tools to call"
    if isinstance(choice, NamedTool | FlatNamedTool) and (name := _find_function(choice).name) not in names:
        return "tool_choice", f"there is no tool {name!r}"
    return None


def _find_function(named: Any) -> Any:
    """Return the part of a tool or a choice that has the function's name."""
    return getattr(named, "function", named)
