"""Rows from feedback: corrections and thumbs that `monitoring.feedback` turned into rows.

One JSON object a line with the fields of a record; each brings its own license and group. Without the file
there is no feedback yet, which is no error.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from stages.common.errors import InputError
from stages.common.records import Row, make_row
from stages.common.sources import Collected, Rejected
from stages.common.sources.files.entries import BadRow, count
from stages.common.sources.files.json_records import read_jsonl
from stages.common.sources.files.messages import read_conversation
from stages.common.sources.files.preferences.answers import read_rating, read_rejected
from stages.common.sources.files.rows import OnBadRow, check_conversation, list_rejected
from stages.common.sources.files.shapes import Shape

SHAPE = Shape("chat", messages="messages", tools="tools", rejected="rejected")


def collect_feedback(path: Path, system_prompt: str | None, on_bad_row: OnBadRow) -> Collected:
    """Read the rows in `path`; none where it is not there.

    `system_prompt` is put before rows that have no system message.

    Raises:
        InputError: `on_bad_row` is "stop" and rows are bad.
    """
    if not path.is_file():
        return Collected((), (), {"file_there": False})
    rows: list[Row] = []
    rejected: list[Rejected] = []
    for entry in read_jsonl(path):
        try:
            if isinstance(entry.fields, BadRow):
                raise entry.fields
            rows.append(_row(dict(entry.fields), system_prompt))
        except BadRow as bad:
            rejected.append(Rejected(str(path), entry.line, bad.reason, bad.detail, entry.content))
    if rejected and on_bad_row == "stop":
        raise InputError(
            f"{path} has {count(len(rejected), 'bad row')}\n{list_rejected(rejected)}",
            "have the retraining flow write the file again, or set collect.on_bad_row: reject",
        )
    return Collected(tuple(rows), tuple(rejected), {"file_there": True, "by_kind": _by_kind(rows)})


def _row(fields: dict[str, Any], system_prompt: str | None) -> Row:
    """Return a line as a record.

    Raises:
        BadRow: a field is missing or no text, or there is no conversation in it.
    """
    for name in ("source", "license", "group"):
        if not isinstance(fields.get(name), str) or not fields[name]:
            raise BadRow("missing_field", f"no {name!r}")
    tags = fields.get("tags") or {}
    if not isinstance(tags, dict) or not all(isinstance(value, str) for value in tags.values()):
        raise BadRow("wrong_tags", "tags are texts by their names")
    own, tools = read_conversation(fields, SHAPE, set())
    messages = check_conversation(own, tools, system_prompt)
    rejected = read_rejected(fields, SHAPE, own, set())
    if rejected:
        check_conversation([*messages[:-1], rejected], tools, None)
    return make_row(
        messages,
        fields["source"],
        fields["license"],
        fields["group"],
        tags,
        "feedback",
        tools,
        rejected,
        read_rating(fields.get("is_desirable")),
    )


def _by_kind(rows: list[Row]) -> dict[str, int]:
    return dict(sorted(Counter(row.tags.get("feedback", "other") for row in rows).items()))
