"""Validate YAML; report each problem with its line, its value and the closest key."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from stages.common.errors import ParamsError

Loc = tuple[int | str, ...]
Problem = tuple[int, str]  # a line of the file, and the problem


class Section(BaseModel):
    """A mapping of the file: frozen, without unknown keys or type conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def find_conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield the key and the reason of each value that contradicts another of this section."""
        yield from ()

    def find_all_conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield the conflicts of this section and of the sections in it, whose keys are joined with dots."""
        yield from self.find_conflicts()
        for name, field in type(self).model_fields.items():
            if isinstance(inner := getattr(self, name), Section):
                for key, text in inner.find_all_conflicts():
                    yield f"{field.alias or name}.{key}", text


@dataclass(frozen=True)
class Document:
    """A parsed file: its values, and the nodes that have their lines."""

    root: yaml.MappingNode
    values: dict[str, Any]

    def line(self, loc: Loc) -> int:
        """Return the line of the key at `loc`, or of the nearest parent that the file has."""
        node: yaml.Node | None = self.root
        line = 1
        for part in loc:
            if isinstance(node, yaml.MappingNode):
                line = next((key.start_mark.line + 1 for key, _ in node.value if key.value == part), line)
            node = _child(node, part)
            if node is None:
                break
            if isinstance(part, int):
                line = node.start_mark.line + 1
        return line


def parse(path: Path) -> Document:
    """Read a YAML mapping as DVC reads it; lists become tuples.

    Raises:
        ParamsError: the file is missing, is not UTF-8, is not YAML, or is not a mapping.
    """
    try:
        root = _compose(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(
            f"{path} does not exist", "run in the project's folder, which contains it"
        ) from None
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path} is not UTF-8: byte {error.start}", "save the file as UTF-8") from None
    except yaml.YAMLError as error:
        raise ParamsError(f"{path} is not YAML: {error}", "correct the line named above") from None
    if not isinstance(root, yaml.MappingNode):
        raise ParamsError(f"{path} has no keys", f"start from the {path} of the repository")
    return Document(root, _tuples(_Loader("").construct_document(root)))


def _compose(text: str) -> yaml.Node | None:
    """Return the nodes of a YAML text, by libyaml where PyYAML has it: a fifth of the time.

    The errors are always those of PyYAML's own parser.
    """
    try:
        root: yaml.Node | None = yaml.compose(text, Loader=_FastLoader)
    except yaml.YAMLError:
        root = yaml.compose(text, Loader=_Loader)
    return root


def check_section(document: Document, key: str, model: Any) -> tuple[Any, list[Problem]]:
    """Validate one top-level key; return its value (None if wrong) and its problems."""
    try:
        value = TypeAdapter(model).validate_python(document.values[key])
    except ValidationError as error:
        return None, list(_described(document, key, model, error))
    return value, [
        (document.line(loc), f"{key}.{inner}: {_shown(_value_at(document.values, loc))} {text}")
        for inner, text in value.find_all_conflicts()
        for loc in [(key, *(int(part) if part.isdigit() else part for part in inner.split(".")))]
    ]


def describe_unknown_key(document: Document, loc: Loc, known: Iterable[str]) -> Problem:
    """Describe an unknown key, with the nearest known one."""
    value = _value_at(document.values, loc)
    shown = "" if isinstance(value, dict) else f" (value {_shown(value)})"
    text = f"{'.'.join(map(str, loc))}: unknown key{shown}{suggest_nearest(str(loc[-1]), known)}"
    return document.line(loc), text


def suggest_nearest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean …?" with the nearest known word, or the list of them."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known: {', '.join(known)}" if known else ""


def find_duplicate_keys(node: yaml.Node) -> Iterator[Problem]:
    """Yield the keys that the file gives twice: YAML would take the last in silence."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                yield key.start_mark.line + 1, f"{key.value}: given twice"
            seen.add(key.value)
            yield from find_duplicate_keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from find_duplicate_keys(item)


class _Loader(yaml.SafeLoader):
    """YAML as DVC reads it: 1e-3 is a number, a version such as 2026.10.27 is text, a day is text."""


class _FastLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The same, parsed by libyaml."""


_FLOAT, _TIMESTAMP = "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag not in (_FLOAT, _TIMESTAMP)]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)
_FastLoader.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _described(document: Document, key: str, model: Any, error: ValidationError) -> Iterator[Problem]:
    for problem in error.errors(include_url=False):
        if problem["type"] == "too_short" and problem["input"]:
            continue  # its items are wrong, and named on lines of their own
        loc = _without_tags(document.root, (key, *problem["loc"]))
        name = ".".join(map(str, loc))
        if problem["type"] == "extra_forbidden":
            yield describe_unknown_key(document, loc, _known_keys(model, problem["loc"]))
        elif problem["type"] == "missing":
            yield document.line(loc), f"{name}: missing"
        else:
            message = problem["msg"][:1].lower() + problem["msg"][1:]
            yield document.line(loc), f"{name}: {message} (value {_shown(problem['input'])})"


def _without_tags(root: yaml.Node, loc: Loc) -> Loc:
    """Drop the parts of a pydantic location that name a union's branch and no key of the file."""
    kept: list[int | str] = []
    node: yaml.Node | None = root
    for index, part in enumerate(loc):
        child = _child(node, part)
        if child is None and index < len(loc) - 1 and node is not None:
            continue
        kept.append(part)
        node = child
    return tuple(kept)


def _child(node: yaml.Node | None, part: int | str) -> yaml.Node | None:
    if isinstance(node, yaml.MappingNode):
        return next((value for key, value in node.value if key.value == part), None)
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        found: yaml.Node = node.value[part]
        return found
    return None


def _known_keys(annotation: Any, loc: Sequence[int | str]) -> list[str]:
    """Return the keys that the model knows at the parent of `loc`, a pydantic location."""
    models = _sections_in(annotation)
    if len(loc) == 1:
        return [name for model in models for name in model.model_fields]
    for model in models:
        if loc[0] in model.model_fields:
            return _known_keys(model.model_fields[str(loc[0])].annotation, loc[1:])
    tagged = [m for m in models if "kind" in m.model_fields and loc[0] in _literals(m)]
    return _known_keys(tagged[0] if tagged else annotation, loc[1:])


def _sections_in(annotation: Any) -> list[type[Section]]:
    """Return the section types that an annotation is made of: itself, a union's, a tuple's."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _sections_in(part)]


def _literals(model: type[Section]) -> tuple[Any, ...]:
    return typing.get_args(model.model_fields["kind"].annotation)


def _tuples(value: Any) -> Any:
    """Lists as tuples: a frozen section is immutable all the way down."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return value


def _value_at(values: Any, loc: Loc) -> Any:
    for part in loc:
        values = values[part]
    return values


def _shown(value: Any) -> str:
    text = re.sub(r"(://[^/'\"\s:]*):[^/'\"\s]*@", r"\1:…@", repr(value))  # a password in a URL
    return text if len(text) <= 60 else text[:57] + "…"
