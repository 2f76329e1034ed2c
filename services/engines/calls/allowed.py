"""What a request allows its answer to call, and the JSON schemas of the arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from services.engines.calls.bounds import check_bounds_together
from services.engines.protocol import SchemaUnsupported
from stages.common.messages import Tool
from stages.common.tools.references import find_loop

# Keywords that may give an object more properties than it names itself.
_OPEN = frozenset(
    {"$dynamicRef", "$ref", "additionalProperties", "allOf", "anyOf", "dependentSchemas", "else", "if", "not"}
    | {"oneOf", "patternProperties", "then", "unevaluatedProperties"}
)


@dataclass(frozen=True, slots=True)
class AllowedCalls:
    """What an answer may call.

    Attributes:
        tools: of the request, all of which are in the prompt.
        mode: `auto`: text or calls; `required`: calls; `none`: text.
        name: the only tool that may be called; None for any.
        is_parallel: whether an answer may hold several calls.
    """

    tools: tuple[Tool, ...]
    mode: Literal["auto", "none", "required"] = "auto"
    name: str | None = None
    is_parallel: bool = True

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """The tools that the answer may call."""
        if self.mode == "none":
            return ()
        return tuple(tool for tool in self.tools if self.name in (None, tool.name))


def read_schema(tool: Tool) -> dict[str, Any]:
    """Return the JSON schema of a tool's arguments, which are an object.

    An object that names its properties has no others, unless a keyword of the schema allows them: the
    tool could not run a call with an argument that it does not know.
    """
    schema = {"type": "object", **tool.parameters}
    if not _OPEN & schema.keys():
        schema["additionalProperties"] = False
    return schema


def check_schemas(tools: Sequence[Tool]) -> None:
    """Check the schemas of tools, all together, against the bounds of a request's schema.

    Raises:
        SchemaUnsupported: a bound is exceeded, or the arguments of a tool are no object.
    """
    parameters = {tool.name: tool.parameters for tool in tools}
    for name, schema in parameters.items():
        if schema.get("type", "object") != "object":
            raise SchemaUnsupported(f"the parameters of {name!r} must be of the type object")
    check_bounds_together([*parameters.values()])
    for name, schema in parameters.items():
        if (reference := find_loop(schema)) is not None:
            raise SchemaUnsupported(f"{reference!r} in the parameters of {name!r} refers to itself")
