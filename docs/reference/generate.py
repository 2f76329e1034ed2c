"""Write the reference of every parameter from params.yaml and its types: `make docs`.

`python docs/reference/generate.py --check` exits 1 if a page is out of date.
"""

from __future__ import annotations

import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from stages.common.checked_yaml import Section
from stages.common.params import Params

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "params.md"
KEY_LINE = re.compile(r"^\s*(?:# )?\s*(?:- )?(?P<key>\w+):\s*(?P<value>.*?)\s*(?:#\s*(?P<comment>.*))?$")


def shipped_lines(text: str) -> dict[str, dict[str, tuple[str, str]]]:
    """Return the value and comment of each key as params.yaml writes them, by section."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    section = ""
    for line in text.splitlines():
        match = KEY_LINE.match(line)
        if match is None or line.startswith("# "):
            continue
        if not line[:1].isspace():
            section = match["key"]
        else:
            value = match["value"]
            found.setdefault(section, {}).setdefault(match["key"], (value, match["comment"] or ""))
    return found


def type_words(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """Describe a type for a person: `integer ≥ 1`, `json · text`, `text or null`."""
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *more = typing.get_args(annotation)
        return type_words(inner, (*metadata, *more))
    if typing.get_origin(annotation) is Literal:
        return " · ".join(f"`{value}`" for value in typing.get_args(annotation))
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return " or ".join(type_words(part, metadata) for part in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        return f"list of {type_words(typing.get_args(annotation)[0])}"
    names = {int: "integer", float: "number", str: "text", bool: "true · false", type(None): "null"}
    word = names.get(annotation, "mapping")
    return word if word in ("null", "mapping") else " ".join([word, *bounds(metadata)])


def bounds(metadata: tuple[Any, ...]) -> Iterator[str]:
    """Yield `≥ 1` and its like for each limit in a field's metadata."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    for item in (part for whole in metadata for part in getattr(whole, "metadata", [whole])):
        for name, sign in signs.items():
            limit = getattr(item, name, None)
            if limit is not None:
                yield f"{sign} {limit:g}"


def table(model: type[Section], lines: dict[str, tuple[str, str]]) -> Iterator[str]:
    """Yield the rows of one section's table."""
    yield "| key | type | shipped | what it does |"
    yield "|---|---|---|---|"
    for name, field in model.model_fields.items():
        if sections_of(field):
            continue
        value, comment = lines.get(name, (default_of(field), ""))
        if name == "kind":
            value, comment = typing.get_args(field.annotation)[0], "says which kind of source the entry is"
        if not comment:
            raise SystemExit(f"params.yaml: {name} of {model.__name__} has no comment that says what it does")
        value = value if len(value) <= 40 else value[:37] + "…"
        kind = type_words(field.annotation, tuple(field.metadata))
        yield f"| `{name}` | {kind} | `{value}` | {comment} |".replace("`` |", "(a text) |")


def default_of(field: FieldInfo) -> str:
    """Return the value that a left-out key takes, as YAML would write it."""
    return "" if field.default is PydanticUndefined else str(field.default)


def sections_of(field: FieldInfo) -> list[type[Section]]:
    """Return the sections nested in a field: one, or those of a list."""

    def walk(annotation: Any) -> Iterator[type[Section]]:
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield annotation
        for part in typing.get_args(annotation):
            yield from walk(part)

    return list(walk(field.annotation))


def page() -> str:
    """Return the reference of every parameter as Markdown."""
    lines = shipped_lines((ROOT / "params.yaml").read_text(encoding="utf-8"))
    out = [
        "# Parameters",
        "",
        "Every key of `params.yaml`, generated from that file and its types by `make docs`.",
        "An unknown key, a wrong type or an impossible pair stops every command before any work.",
        "",
    ]
    for name, field in Params.model_fields.items():
        key = field.alias or name
        model = field.annotation
        assert isinstance(model, type)
        out += [f"## {key}", "", str(model.__doc__), ""]
        if any(not sections_of(inner) for inner in model.model_fields.values()):
            out += [*table(model, lines[key]), ""]
        for inner_name, inner in model.model_fields.items():
            for nested in sections_of(inner):
                out += [f"### {key}.{inner_name}: {nested.__name__}", "", str(nested.__doc__), ""]
                out += [*table(nested, lines[key]), ""]
    return "\n".join(out).rstrip() + "\n"


def main() -> None:
    """Write the page, or check it."""
    text = page()
    if sys.argv[1:] == ["--check"]:
        if PAGE.read_text(encoding="utf-8") != text:
            raise SystemExit(f"{PAGE.relative_to(ROOT)} is out of date; run: make docs")
    else:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
