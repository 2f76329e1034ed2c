"""The kind of task that a set of answers belongs to: JSON, one of a closed set of labels, or text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stages.common.errors import InputError
from stages.common.sources.files.entries import shorten
from stages.common.sources.files.shapes import is_label_column, is_label_like

Kind = Literal["json", "label", "text"]

LABEL_KEYS = ("intent", "label", "class", "category", "type", "action", "command", "function", "tool", "name")
MIN_JSON_SHARE = 0.95  # of the answers; the others are broken rows
MAX_JSON_SHARE = 0.05  # of the answers of another kind: some texts happen to be JSON
# Between labels (each three times, see `is_label_column`) and texts that rarely repeat.
MAX_TEXT_REPEATS = 1.5


@dataclass(frozen=True, slots=True)
class TaskKind:
    """The kind, the key of the class in JSON answers, and one sentence on what decided."""

    kind: Kind
    label_key: str | None
    reason: str


def detect_task_kind(
    answers: Sequence[str], kind: Kind | None = None, label_key: str | None = None
) -> TaskKind:
    """Return the kind of task of the answers.

    Args:
        kind: where the user gives it; label_key: the key of the class in JSON answers, likewise.

    Raises:
        InputError: the answers could be of two kinds, are all the same, or lack `label_key`.
    """
    different = Counter(answers)
    if len(different) < 2:
        raise InputError(
            f"all {len(answers):,} rows have the same answer: {shorten(answers[0])}",
            "name the column of the answers, or add rows with other answers",
        )
    if kind in ("label", "text"):
        return TaskKind(
            kind, None, f"as given; {len(different):,} different answers in {len(answers):,} rows"
        )
    values = [value for answer in answers if (value := _parse(answer)) is not None]
    share = len(values) / len(answers)
    if share >= MIN_JSON_SHARE or kind == "json" or label_key is not None:
        return _describe_json(values, len(answers), label_key)
    if share > MAX_JSON_SHARE:
        raise InputError(
            f"{len(values):,} of {len(answers):,} answers are JSON, and the others are not",
            "choose with --kind: json (curate drops the others) or text",
        )
    repeats = len(answers) / len(different)
    if is_label_column(answers):
        return TaskKind("label", None, f"{len(different):,} different short answers in {len(answers):,} rows")
    if repeats > MAX_TEXT_REPEATS and all(map(is_label_like, different)):
        raise InputError(
            f"{len(different):,} different short answers in {len(answers):,} rows: labels with few rows "
            f"each, or texts; the most frequent is {shorten(different.most_common(1)[0][0])}",
            "choose with --kind: label (one of a closed set) or text",
        )
    return TaskKind("text", None, f"{len(different):,} different answers in {len(answers):,} rows")


def find_label_keys(values: Sequence[Any]) -> list[str]:
    """Return the keys of JSON objects whose values are classes, those with a usual name first."""
    objects = [value for value in values if isinstance(value, Mapping)]
    if len(objects) < MIN_JSON_SHARE * len(values):
        return []
    keys = Counter(key for value in objects for key in value)
    found = []
    for key, number in keys.items():
        texts = [value[key] for value in objects if isinstance(value.get(key), str)]
        if number >= MIN_JSON_SHARE * len(objects) and len(texts) == number and is_label_column(texts):
            found.append(key)
    return sorted(found, key=lambda key: LABEL_KEYS.index(key) if key in LABEL_KEYS else len(LABEL_KEYS))


def _describe_json(values: Sequence[Any], answers: int, label_key: str | None) -> TaskKind:
    reason = f"{len(values):,} of {answers:,} answers are JSON"
    if label_key is not None:
        have = sum(isinstance(value, Mapping) and isinstance(value.get(label_key), str) for value in values)
        if not have:
            raise InputError(
                f"no answer is a JSON object with a text under {label_key!r}",
                f"use one of its keys: {', '.join(_list_keys(values)) or 'there are none'}",
            )
        return TaskKind("json", label_key, reason)
    keys = find_label_keys(values)
    if len(keys) > 1 and keys[0] not in LABEL_KEYS:
        return TaskKind(
            "json", None, f"{reason}; {', '.join(keys)} could name the class: choose with --label-key"
        )
    return TaskKind("json", keys[0] if keys else None, reason)


def _list_keys(values: Sequence[Any]) -> list[str]:
    return list(dict.fromkeys(key for value in values if isinstance(value, Mapping) for key in value))[:20]


def _parse(answer: str) -> dict[str, Any] | list[Any] | None:
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None
