"""Normalise the spelling of texts: Unicode's NFC and line ends, and nothing else."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.common.records import Message, Row, make_row


def compose_characters(text: str) -> str:
    """Return the text in NFC: a letter and its accents are one character."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def unify_line_ends(text: str) -> str:
    """Return the text with a line feed at the end of each line."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


CHANGES: Mapping[str, Callable[[str], str]] = {"nfc": compose_characters, "line_ends": unify_line_ends}


@dataclass(frozen=True, slots=True)
class Change:
    """What was changed in one message of a row: the names in `CHANGES`, the text before and after."""

    row: str
    role: str
    names: tuple[str, ...]
    before: str
    after: str


def spell_rows(rows: Iterable[Row], names: Sequence[str]) -> tuple[list[Row], list[Change]]:
    """Return the rows with the named changes, each with the id of its new text, and what was changed."""
    changes: list[Change] = []
    return [_spell_row(row, names, changes) for row in rows], changes


def _spell_row(row: Row, names: Sequence[str], changes: list[Change]) -> Row:
    messages, changed = [], []
    for message in row.messages:
        text, applied = message.content, []
        for name in names:
            after = CHANGES[name](text)
            if after != text:
                text = after
                applied.append(name)
        if applied:
            changed.append((message, tuple(applied), text))
        messages.append(Message(message.role, text) if applied else message)
    if not changed:
        return row
    group = None if row.group == row.id else row.group
    new = make_row(messages, row.source, row.license, group=group, tags=row.tags, origin=row.origin)
    changes += [
        Change(new.id, message.role, names, message.content, text) for message, names, text in changed
    ]
    return new


def count_changes(changes: Sequence[Change]) -> dict[str, Any]:
    """Return how many rows were changed, and in how many messages each change was made."""
    made = Counter(name for change in changes for name in change.names)
    return {
        "rows_changed": len({change.row for change in changes}),
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
