"""Normalise the spelling of texts: Unicode's NFC and line ends, and nothing else."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.common.messages import Message
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
    """What was changed in one message of a row: the names in `CHANGES`, the text before and after."""

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
    for message, applied_names, text in changed:
        changes.append(Change(new.id, message.role, applied_names, message.content, text))
    return new


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
