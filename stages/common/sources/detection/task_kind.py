"""The kind of task that a set of answers belongs to: JSON, a label, text, conversations, calls of tools."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stages.common.errors import InputError
from stages.common.records import Row
from stages.common.sources.files.entries import shorten
from stages.common.sources.files.shapes import are_labels, is_label_like

Kind = Literal["json", "label", "text", "chat", "tools"]

LABEL_KEYS = ("intent", "label", "class", "category", "type", "action", "command", "function", "tool", "name")
MIN_JSON_SHARE = 0.95  # of the answers; the others are broken rows
MAX_JSON_SHARE = 0.05  # of the answers of another kind: some texts happen to be JSON
# Between labels (each three times, see `is_label_column`) and texts that rarely repeat.
MAX_TEXT_REPEATS = 1.5
MIN_CONVERSATION_SHARE = 0.5  # of the rows that have several answers: with fewer, the last ones are learned


@dataclass(frozen=True, slots=True)
class TaskKind:
    """The kind, the key of the class in JSON answers, and one sentence on what decided."""

    kind: Kind
    label_key: str | None
    reason: str


class _Answers:
    """What is counted of answers in one pass; of long ones only that they differ is kept."""

    def __init__(self, answers: Iterable[str]) -> None:
        self.rows = 0
        self.first = ""
        self.different: Counter[str | int] = Counter()
        self.values = 0  # that are JSON objects or arrays
        self.objects = 0
        self.keys: Counter[str] = Counter()
        self.texts: Counter[str] = Counter()  # objects by the keys that have a text
        self._by_key: defaultdict[str, Counter[str | int]] = defaultdict(Counter)
        for answer in answers:
            self._add(answer)

    def _add(self, answer: str) -> None:
        self.first = self.first if self.rows else answer
        self.rows += 1
        self.different[_shrink(answer)] += 1
        value = _parse(answer)
        self.values += value is not None
        if not isinstance(value, dict):
            return
        self.objects += 1
        self.keys.update(value.keys())
        for key, text in value.items():
            if isinstance(text, str):
                self.texts[key] += 1
                self._by_key[key][_shrink(text)] += 1

    def has_labels(self) -> bool:
        return are_labels(self.different)

    def find_label_keys(self) -> list[str]:
        """Return the keys of JSON objects whose values are classes, those with a usual name first."""
        if self.objects < MIN_JSON_SHARE * self.values:
            return []
        found = [
            key
            for key, rows in self.keys.items()
            if rows >= MIN_JSON_SHARE * self.objects
            and self.texts[key] == rows
            and are_labels(self._by_key[key])
        ]
        return sorted(found, key=lambda key: LABEL_KEYS.index(key) if key in LABEL_KEYS else len(LABEL_KEYS))


def _shrink(text: str) -> str | int:
    """Return a text that may be a label, or the hash of one that cannot: it may be long."""
    return text if is_label_like(text) else hash(text)


def detect_task_kind(
    answers: Iterable[str], kind: Kind | None = None, label_key: str | None = None
) -> TaskKind:
    """Return the kind of task of the answers, which are read once.

    Args:
        kind: where the user gives it; label_key: the key of the class in JSON answers, likewise.

    Raises:
        InputError: the answers could be of two kinds, are all the same, or lack `label_key`.
    """
    found = _Answers(answers)
    different = len(found.different)
    if different < 2:
        raise InputError(
            f"all {found.rows:,} rows have the same answer: {shorten(found.first)}",
            "name the column of the answers, or add rows with other answers",
        )
    if kind in ("label", "text", "chat", "tools"):
        return TaskKind(kind, None, f"as given; {different:,} different answers in {found.rows:,} rows")
    share = found.values / found.rows
    if share >= MIN_JSON_SHARE or kind == "json" or label_key is not None:
        return _describe_json(found, label_key)
    if share > MAX_JSON_SHARE:
        raise InputError(
            f"{found.values:,} of {found.rows:,} answers are JSON, and the others are not",
            "choose with --kind: json (curate drops the others) or text",
        )
    if found.has_labels():
        return TaskKind("label", None, f"{different:,} different short answers in {found.rows:,} rows")
    if found.rows / different > MAX_TEXT_REPEATS and all(isinstance(a, str) for a in found.different):
        raise InputError(
            f"{different:,} different short answers in {found.rows:,} rows: labels with few rows "
            f"each, or texts; the most frequent is {shorten(found.different.most_common(1)[0][0])}",
            "choose with --kind: label (one of a closed set) or text",
        )
    return TaskKind("text", None, f"{different:,} different answers in {found.rows:,} rows")


def detect_conversations(rows: Sequence[Row], kind: Kind | None = None) -> TaskKind | None:
    """Return the kind `tools` for rows with calls, `chat` for texts in several turns, None for other answers.

    Args:
        kind: where the user gives it.

    Raises:
        InputError: the user gives `tools`, and no row has a call.
    """
    calling = several = 0
    for row in rows:
        calling += any(message.tool_calls for message in row.messages)
        several += sum(message.role == "assistant" for message in row.messages) > 1
    if kind == "tools" and not calling:
        raise InputError("no row has a call of a tool", "choose --kind chat or text, or add rows with calls")
    if calling and kind in (None, "tools"):
        return TaskKind("tools", None, f"{calling:,} of {len(rows):,} rows call tools")
    if kind != "chat" and (kind is not None or several < MIN_CONVERSATION_SHARE * len(rows)):
        return None
    answers = (message.answer for row in rows for message in row.messages if message.role == "assistant")
    found = detect_task_kind(answers, kind)
    reason = f"{several:,} of {len(rows):,} rows have several answers"
    return TaskKind("chat", None, reason) if found.kind in ("text", "chat") else None


def _describe_json(found: _Answers, label_key: str | None) -> TaskKind:
    reason = f"{found.values:,} of {found.rows:,} answers are JSON"
    if label_key is not None:
        if not found.texts[label_key]:
            raise InputError(
                f"no answer is a JSON object with a text under {label_key!r}",
                f"use one of its keys: {', '.join(list(found.keys)[:20]) or 'there are none'}",
            )
        return TaskKind("json", label_key, reason)
    keys = found.find_label_keys()
    if len(keys) > 1 and keys[0] not in LABEL_KEYS:
        return TaskKind(
            "json", None, f"{reason}; {', '.join(keys)} could name the class: choose with --label-key"
        )
    return TaskKind("json", keys[0] if keys else None, reason)


def _parse(answer: str) -> dict[str, Any] | list[Any] | None:
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None
