"""What a request allows its answer to call, and the JSON schemas of the arguments."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from services.engines.protocol import SchemaUnsupported
from services.schemas.bounds import check_bounds
from stages.common.messages import Tool

MAX_TOOLS = 128  # as OpenAI has it
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
    for tool in tools:
        if tool.parameters.get("type", "object") != "object":
            raise SchemaUnsupported(f"the parameters of {tool.name!r} must be of the type object")
        if (reference := _find_loop(tool.parameters)) is not None:
            raise SchemaUnsupported(f"{reference!r} in the parameters of {tool.name!r} refers to itself")
    check_bounds(json.dumps({"anyOf": [tool.parameters for tool in tools]}))


def _find_loop(schema: dict[str, Any]) -> str | None:
    """Return a reference that leads to itself without any keyword between, so that it describes nothing."""
    parts: list[Any] = [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        elif isinstance(part, dict):
            parts += part.values()
            if "$ref" in part and _leads_to_itself(schema, part["$ref"]):
                return str(part["$ref"])
    return None


def _leads_to_itself(schema: Any, reference: Any) -> bool:
    seen: set[str] = set()
    while isinstance(reference, str) and reference.startswith("#"):
        if reference in seen:
            return True
        seen.add(reference)
        target = schema
        for name in reference.removeprefix("#").split("/")[1:]:
            target = (
                target.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
            )
        reference = target.get("$ref") if isinstance(target, dict) else None
    return False
