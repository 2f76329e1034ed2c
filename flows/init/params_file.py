"""Change values in `params.yaml` and keep everything else of the file: comments, order, spelling."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.scalarstring import FoldedScalarString, SingleQuotedScalarString
from yaml import YAMLError
from yaml import safe_load as load_yaml_1_1

from stages.common.errors import ParamsError

Changes = Mapping[
    str, Mapping[str, Any]
]  # values by section and key; a mapping as value replaces the old one

LINE_CHARS = 110
FEEDBACK = {"kind": "feedback", "path": "data/feedback/rows.jsonl"}


class _NullWriter(RoundTripRepresenter):
    """Writes null as a word; a class of its own, because a representer is set for all users of a class."""


_NullWriter.add_representer(
    type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
)


def edit_params(text: str, changes: Changes) -> str:
    """Return the text of `params.yaml` with new values in it.

    Only the sections that change are written again; the rest of the text is the same bytes. Sources of kind
    `feedback` stay behind the new ones.

    Raises:
        ParamsError: the file lacks a section that is to change.
    """
    yaml = _make_yaml()
    document = yaml.load(text)
    if absent := [name for name in changes if not isinstance(document, dict) or name not in document]:
        raise ParamsError(
            f"params.yaml has no section {', '.join(absent)}",
            "take the section from the repository's params.yaml",
        )
    for name, values in changes.items():
        section = document[name]
        for key, value in values.items():
            if (name, key) == ("collect", "sources"):
                value = [*value, *_keep_feedback(section.get(key) or [])]
            _set_value(section, key, value)
    buffer = io.StringIO()
    yaml.dump(document, buffer)
    return _splice(text, buffer.getvalue(), set(changes))


def _make_yaml() -> YAML:
    yaml = YAML()
    yaml.Representer = _NullWriter
    yaml.preserve_quotes = True
    yaml.width = 10_000  # lines of the file are folded by hand
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def _keep_feedback(sources: Sequence[Any]) -> list[Any]:
    """Return the sources of feedback with their comments, or a new one: retraining learns from it."""
    return [source for source in sources if source.get("kind") == "feedback"] or [FEEDBACK]


def _set_value(section: Any, key: str, value: Any) -> None:
    """Set a value; what is equal stays as it is written."""
    old = section.get(key)
    if key in section and old == value:
        return
    if isinstance(old, CommentedMap) and isinstance(value, Mapping):
        for name in [name for name in old if name not in value]:
            del old[name]
        for name, inner in value.items():
            _set_value(old, name if name in old else _quote(name), inner)
    elif isinstance(old, CommentedSeq) and isinstance(value, list | tuple):
        old[:] = [_to_node(item) for item in value]
    elif isinstance(old, FoldedScalarString) and isinstance(value, str):
        section[key] = _fold(value)
    else:
        section[key] = _to_node(value, is_inline=True)


def _to_node(value: Any, is_inline: bool = False) -> Any:
    """Return a value as ruamel writes it: lists inline, mappings in lists as blocks."""
    if isinstance(value, CommentedMap | CommentedSeq):
        return value
    if isinstance(value, Mapping):
        mapping = CommentedMap((_quote(key), _to_node(inner, is_inline=True)) for key, inner in value.items())
        if is_inline:
            mapping.fa.set_flow_style()
        return mapping
    if isinstance(value, list | tuple):
        sequence = CommentedSeq(_to_node(inner, is_inline=True) for inner in value)
        sequence.fa.set_flow_style()
        return sequence
    return _quote(value) if isinstance(value, str) else value


def _quote(text: str) -> str:
    """Return a text in quotes if YAML 1.1, which reads the file, would read another value.

    ruamel writes YAML 1.2, where `no` (Norwegian), `on` and `12:30` are texts without quotes.
    """
    try:
        is_text = load_yaml_1_1(text) == text
    except YAMLError:
        is_text = False
    return text if is_text else SingleQuotedScalarString(text)


def _fold(text: str) -> Any:
    folded: Any = FoldedScalarString(text)
    positions, place = [], 0
    for line in textwrap.wrap(text, LINE_CHARS - 4, break_long_words=False, break_on_hyphens=False)[:-1]:
        place += len(line)
        positions.append(place)
        place += 1
    folded.fold_pos = positions
    return folded


def _splice(old: str, new: str, names: set[str]) -> str:
    """Return the old text with the named top-level sections taken from the new one."""
    sections = dict(_split_sections(new))
    known = set(old.splitlines())
    parts = []
    for name, text in _split_sections(old):
        parts.append(_close_gaps(sections[name], known) if name in names else text)
    return "".join(parts)


def _split_sections(text: str) -> list[tuple[str, str]]:
    """Return the top-level sections with their names; what comes before the first has none."""
    places = [(match.group(1), match.start()) for match in re.finditer(r"^([\w-]+):", text, re.MULTILINE)]
    starts = [("", 0), *places]
    ends = [start for _, start in places] + [len(text)]
    return [(name, text[start:end]) for (name, start), end in zip(starts, ends, strict=True)]


def _close_gaps(section: str, known: set[str]) -> str:
    """Return a section whose changed lines have one space before the comment: ruamel keeps its old column."""
    lines = [
        line if line.rstrip("\n") in known else re.sub(r"(?<=\S) {2,}# ", " # ", line)
        for line in section.splitlines(keepends=True)
    ]
    return "".join(lines)
