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
    parameters = {tool.name: tool.parameters for tool in tools}
    for name, schema in parameters.items():
        if schema.get("type", "object") != "object":
            raise SchemaUnsupported(f"the parameters of {name!r} must be of the type object")
    check_bounds(json.dumps({"anyOf": [*parameters.values()]}))
    for name, schema in parameters.items():
        if (reference := _find_loop(schema)) is not None:
            raise SchemaUnsupported(f"{reference!r} in the parameters of {name!r} refers to itself")


def _find_loop(schema: dict[str, Any]) -> str | None:
    """Return a reference that leads to itself without any keyword between, so that it describes nothing.

    Each reference is followed once, so that a chain takes a time linear in its length.
    """
    parts: list[Any] = [schema]
    harmless: set[str] = set()
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        elif isinstance(part, dict):
            parts += part.values()
            if _leads_to_itself(schema, part.get("$ref"), harmless):
                return str(part["$ref"])
    return None


def _leads_to_itself(schema: Any, reference: Any, harmless: set[str]) -> bool:
    """Return whether a reference leads to itself; if not, those on its way are added to `harmless`."""
    seen: set[str] = set()
    while isinstance(reference, str) and reference.startswith("#") and reference not in harmless:
        if reference in seen:
            return True
        seen.add(reference)
        reference = _follow(schema, reference)
    harmless |= seen
    return False


def _follow(schema: Any, reference: str) -> Any:
    """Return the reference at the place that a reference names; None if there is none."""
    target = schema
    for name in reference.removeprefix("#").split("/")[1:]:
        target = target.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
    return target.get("$ref") if isinstance(target, dict) else None
