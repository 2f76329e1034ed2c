"""Normalise the spelling of texts (Unicode's NFC and line ends) and of the arguments of calls.

Nothing else is changed, each change has a switch, and it is counted and kept, before and after.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from stages.common.messages import Message, Tool, ToolCall, format_arguments
from stages.common.records import Row, count_chars, make_row
from stages.common.spool import Spool, spool
from stages.common.tools.arguments import is_same, list_changes


def compose_characters(text: str) -> str:
    """Return the text in NFC: a letter and its accents are one character."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def unify_line_ends(text: str) -> str:
    """Return the text with a line feed at the end of each line."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


CHANGES: Mapping[str, Callable[[str], str]] = {"nfc": compose_characters, "line_ends": unify_line_ends}
Ways = Mapping[str, Callable[[str], str]]  # changes of a text by their names


@dataclass(frozen=True, slots=True)
class Change:
    """What was changed in one text of a row: the names of the changes, the text before and after.

    Attributes:
        role: of the message, `tools` for the schema of a tool.
    """

    row: str
    role: str
    names: tuple[str, ...]
    before: str
    after: str


def spell_rows(rows: Iterable[Row], names: Sequence[str]) -> tuple[Sequence[Row], Sequence[Change]]:
    """Return the rows with the named changes, each with the id of its new text, and what was changed.

    The changes of arguments (`stages/common/tools/arguments.py`) are those that the grammar of the service
    needs: without them the rule about calls rejects arguments that it cannot write.
    """
    changes: Spool[Change] = Spool(lambda change: len(change.before) + len(change.after))
    return spool((_spell_row(row, names, changes) for row in rows), count_chars), changes


def _spell_row(row: Row, names: Sequence[str], changes: Spool[Change]) -> Row:
    changed: list[tuple[str, tuple[str, ...], str, str]] = []

    def spell(role: str, before: str, ways: Ways) -> str:
        after, applied = before, []
        for name, change in ways.items():
            spelled = change(after)
            if spelled != after:
                after = spelled
                applied.append(name)
        if applied:
            changed.append((role, tuple(applied), before, after))
        return after

    in_texts = {name: change for name, change in CHANGES.items() if name in names}
    in_values = {
        name: partial(_spell_json, partial(_spell_value, change=change)) for name, change in in_texts.items()
    }
    tools = tuple(Tool(spell("tools", tool.text, in_values)) for tool in row.tools)
    by_name = {tool.name: tool for tool in tools}

    def spell_call(role: str, call: ToolCall) -> ToolCall:
        every = list_changes(by_name[call.name]) if call.name in by_name else {}
        own = {name: partial(_spell_json, change) for name, change in every.items() if name in names}
        return replace(call, arguments=spell(role, call.arguments, in_values | own))

    def spell_message(message: Message) -> Message:
        """Return a message with its text, its reasoning and the arguments of its calls spelled."""
        reasoning = message.reasoning
        return replace(
            message,
            content=spell(message.role, message.content, in_texts),
            reasoning=None if reasoning is None else spell(message.role, reasoning, in_texts),
            tool_calls=tuple(spell_call(message.role, call) for call in message.tool_calls),
        )

    messages = [spell_message(message) for message in row.messages]
    rejected = spell_message(row.rejected) if row.rejected else None
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


def _spell_json(change: Callable[[Any], Any], text: str) -> str:
    """Return a JSON text with a change made in its values: in the text, it could break an escape.

    A text of which two keys would become one is left as it is.
    """
    value = json.loads(text)
    try:
        spelled = change(value)
    except KeyError:
        return text
    return text if is_same(spelled, value) else format_arguments(spelled)


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
