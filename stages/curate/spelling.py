"""Normalise the spelling of texts: Unicode's NFC and line ends, and nothing else."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stages.common.messages import Message, Tool, format_arguments
from stages.common.records import Row, count_chars, make_row
from stages.common.spool import Spool, spool


def compose_characters(text: str) -> str:
    """Return the text in NFC: a letter and its accents are one character."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def unify_line_ends(text: str) -> str:
    """Return the text with a line feed at the end of each line."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


CHANGES: Mapping[str, Callable[[str], str]] = {"nfc": compose_characters, "line_ends": unify_line_ends}


@dataclass(frozen=True, slots=True)
class Change:
    """What was changed in one text of a row: the names in `CHANGES`, the text before and after.

    Attributes:
        role: of the message, `tools` for the schema of a tool.
    """

    row: str
    role: str
    names: tuple[str, ...]
    before: str
    after: str


def spell_rows(rows: Iterable[Row], names: Sequence[str]) -> tuple[Sequence[Row], Sequence[Change]]:
    """Return the rows with the named changes, each with the id of its new text, and what was changed."""
    changes: Spool[Change] = Spool(lambda change: len(change.before) + len(change.after))
    return spool((_spell_row(row, names, changes) for row in rows), count_chars), changes


def _spell_row(row: Row, names: Sequence[str], changes: Spool[Change]) -> Row:
    changed: list[tuple[str, tuple[str, ...], str, str]] = []

    def spell(role: str, before: str, change: Callable[[str, str], str]) -> str:
        after, applied = before, []
        for name in names:
            spelled = change(name, after)
            if spelled != after:
                after = spelled
                applied.append(name)
        if applied:
            changed.append((role, tuple(applied), before, after))
        return after

    messages = [_spell_message(message, spell) for message in row.messages]
    rejected = _spell_message(row.rejected, spell) if row.rejected else None
    tools = tuple(Tool(spell("tools", tool.text, _spell_json)) for tool in row.tools)
    if not changed:
        return row
    group = None if row.group == row.id else row.group
    new = make_row(
        messages,
        row.source,
        row.license,
        group=group,
        tags=row.tags,
        origin=row.origin,
        tools=tools,
        rejected=rejected,
        is_desirable=row.is_desirable,
    )
    for role, applied_names, before, after in changed:
        changes.append(Change(new.id, role, applied_names, before, after))
    return new


def _spell_message(message: Message, spell: Callable[[str, str, Callable[[str, str], str]], str]) -> Message:
    """Return a message with its text, its reasoning and the strings of its calls' arguments spelled."""
    reasoning = message.reasoning
    return replace(
        message,
        content=spell(message.role, message.content, _spell_text),
        reasoning=None if reasoning is None else spell(message.role, reasoning, _spell_text),
        tool_calls=tuple(
            replace(call, arguments=spell(message.role, call.arguments, _spell_json))
            for call in message.tool_calls
        ),
    )


def _spell_text(name: str, text: str) -> str:
    return CHANGES[name](text)


def _spell_json(name: str, text: str) -> str:
    """Return a JSON text with a change made in its strings: in the text, it could break an escape.

    A text of which two keys would become one is left as it is.
    """
    value = json.loads(text)
    try:
        spelled = _spell_value(value, CHANGES[name])
    except KeyError:
        return text
    return text if spelled == value else format_arguments(spelled)


def _spell_value(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_spell_value(item, change) for item in value]
    if not isinstance(value, dict):
        return value
    spelled = {change(key): _spell_value(inner, change) for key, inner in value.items()}
    if len(spelled) < len(value):
        raise KeyError
    return spelled


def count_changes(changes: Iterable[Change]) -> dict[str, Any]:
    """Return how many rows were changed, and in how many messages each change was made."""
    made: Counter[str] = Counter()
    rows = set()
    for change in changes:
        made.update(change.names)
        rows.add(change.row)
    return {
        "rows_changed": len(rows),
        "messages_changed_by": dict(sorted(made.items())),
    }


def format_changes(changes: Iterable[Change]) -> Iterable[str]:
    """Yield one JSON object a line: the row's new id, the role, the changes, the text before and after."""
    for change in changes:
        line = {
            "row": change.row,
            "role": change.role,
            "changes": change.names,
            "before": change.before,
            "after": change.after,
        }
        yield json.dumps(line, ensure_ascii=False) + "\n"
