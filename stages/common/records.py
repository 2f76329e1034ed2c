"""The record: one conversation example, and the Parquet file that carries many."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from stages.common.artifacts import atomic_write, missing
from stages.common.errors import InputError
from stages.common.spool import pick, spool

ROLES = ("system", "user", "assistant")
ORIGINS = ("human", "template", "synthetic", "feedback")
ROWS_A_BATCH = 2000  # written and read at a time: a row may hold a passage


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; `role` is one of `ROLES`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation that ends with the answer to learn.

    Attributes:
        id: hash of the messages: the same conversation has the same id everywhere.
        source: where it came from; license: the SPDX id under which it may be used.
        group: rows of one group stay on one side of a split (expansions of one template).
        tags: free keys and values: intent, language, platform.
        origin: one of `ORIGINS`.
    """

    id: str
    messages: tuple[Message, ...]
    source: str
    license: str
    group: str
    tags: Mapping[str, str] = field(default_factory=dict)
    origin: str = "human"

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All turns before the answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The content of the last turn, which is the assistant's."""
        return self.messages[-1].content

    @property
    def question(self) -> str:
        """The content of the last user turn."""
        return next(m.content for m in reversed(self.messages) if m.role == "user")


def format_canonical_json(value: Any) -> str:
    """Return the one JSON text of `value`: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def make_row(
    messages: Sequence[Message],
    source: str,
    license: str,
    group: str | None = None,
    tags: Mapping[str, str] | None = None,
    origin: str = "human",
) -> Row:
    """Build a row from its messages; the id follows from them, and the group from the id if not given.

    Raises:
        ValueError: the messages are no conversation to learn from; the message has the reason.
    """
    problem = find_conversation_problem(messages)
    if problem:
        raise ValueError(problem)
    digest = hashlib.sha256(
        format_canonical_json([[m.role, m.content] for m in messages]).encode()
    ).hexdigest()[:16]
    return Row(
        id=digest,
        messages=tuple(messages),
        source=source,
        license=license,
        group=group or digest,
        tags=dict(sorted((tags or {}).items())),
        origin=origin,
    )


def find_conversation_problem(messages: Sequence[Message]) -> str | None:
    """Return why `messages` cannot be learned from, or None."""
    if not messages:
        return "no messages"
    for message in messages:
        if message.role not in ROLES:
            return f"unknown role {message.role!r} (known: {', '.join(ROLES)})"
    if any(m.role == "system" for m in messages[1:]):
        return "a system message after the first place"
    if not any(m.role == "user" for m in messages):
        return "no user message"
    if messages[-1].role != "assistant":
        return "no answer: the last message is not the assistant's"
    if not messages[-1].content.strip():
        return "no answer: the last message is empty"
    return None


def format_reject(row: Row, reason: str, detail: str) -> str:
    """Return the line of a file of rejects: a JSON object with id, reason, detail and row."""
    line = {"id": row.id, "reason": reason, "detail": detail, "row": {**asdict(row), "tags": dict(row.tags)}}
    return json.dumps(line, ensure_ascii=False) + "\n"


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as Parquet, all or nothing; equal rows give equal bytes."""
    import pyarrow.parquet as pq

    rest = iter(rows)
    with (
        atomic_write(path) as temporary,
        pq.ParquetWriter(temporary, _schema(), compression="zstd") as file,
    ):
        # Some at a time: as Arrow's columns the rows take their memory a second time.
        while batch := list(islice(rest, ROWS_A_BATCH)):
            file.write_table(_to_table(batch))


def _to_table(rows: Sequence[Row]) -> Any:
    import pyarrow as pa

    columns: dict[str, list[Any]] = {
        "id": [row.id for row in rows],
        "messages": [[{"role": m.role, "content": m.content} for m in row.messages] for row in rows],
        "source": [row.source for row in rows],
        "license": [row.license for row in rows],
        "group": [row.group for row in rows],
        "tags": [sorted(row.tags.items()) for row in rows],
        "origin": [row.origin for row in rows],
    }
    return pa.table(columns, schema=_schema())


def count_chars(row: Row) -> int:
    """Return the characters of a row's messages."""
    return sum(len(message.content) for message in row.messages)


def exclude_feedback(rows: Sequence[Row]) -> Sequence[Row]:
    """Return the rows that are not feedback from production."""
    own = [number for number, row in enumerate(rows) if row.origin != "feedback"]
    return pick(rows, own) if len(own) < len(rows) else rows


def sort_feedback_last(rows: Sequence[Row]) -> Sequence[Row]:
    """Return the rows in their order, with those from feedback after the others."""
    is_feedback = [row.origin == "feedback" for row in rows]
    return pick(rows, sorted(range(len(rows)), key=is_feedback.__getitem__)) if any(is_feedback) else rows


def read_rows(path: Path) -> Sequence[Row]:
    """Return the rows that `write_rows` wrote: a list, or a spool if their texts are large.

    A row of a spool is read again each time it is asked for: go through them once, in their order.

    Raises:
        InputError: the file is not there, is not Parquet, or has other columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.exists():
        raise missing(path)
    try:
        with pq.ParquetFile(path) as file:
            if not file.schema_arrow.equals(_schema()):
                raise InputError(
                    f"{path} has the columns {file.schema_arrow.names}, not {_schema().names}",
                    "run the stage that writes it again",
                )
            rows = (
                _from_record(record)
                for batch in file.iter_batches(ROWS_A_BATCH)
                for record in batch.to_pylist()
            )
            return spool(rows, count_chars)
    except pa.ArrowInvalid as error:
        raise InputError(
            f"{path} cannot be read as Parquet: {error}", "run the stage that writes it again"
        ) from None


def _from_record(record: Mapping[str, Any]) -> Row:
    return Row(
        id=record["id"],
        messages=tuple(Message(sys.intern(m["role"]), m["content"]) for m in record["messages"]),
        source=sys.intern(record["source"]),
        license=sys.intern(record["license"]),
        group=record["group"],
        tags=dict(record["tags"]),
        origin=sys.intern(record["origin"]),
    )


def _schema() -> Any:
    import pyarrow as pa

    text = pa.string()
    return pa.schema(
        [
            ("id", text),
            ("messages", pa.list_(pa.struct([("role", text), ("content", text)]))),
            ("source", text),
            ("license", text),
            ("group", text),
            ("tags", pa.map_(text, text)),
            ("origin", text),
        ]
    )
