"""The record: one conversation example, and the Parquet file that carries many."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.common.artifacts import atomic_write, missing
from stages.common.errors import InputError

ROLES = ("system", "user", "assistant")
ORIGINS = ("human", "template", "synthetic", "feedback")


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


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as Parquet, all or nothing; equal rows give equal bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = {name: [] for name in _schema().names}
    for row in rows:
        columns["id"].append(row.id)
        columns["messages"].append([{"role": m.role, "content": m.content} for m in row.messages])
        columns["source"].append(row.source)
        columns["license"].append(row.license)
        columns["group"].append(row.group)
        columns["tags"].append(sorted(row.tags.items()))
        columns["origin"].append(row.origin)
    table = pa.table(columns, schema=_schema())
    with atomic_write(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_rows(path: Path) -> list[Row]:
    """Read the rows that `write_rows` wrote.

    Raises:
        InputError: the file is not there, is not Parquet, or has other columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.exists():
        raise missing(path)
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise InputError(
            f"{path} cannot be read as Parquet: {error}", "run the stage that makes it again"
        ) from None
    if not table.schema.equals(_schema()):
        raise InputError(
            f"{path} has the columns {table.schema.names}, not {_schema().names}",
            "run the stage that makes it again",
        )
    return [
        Row(
            id=record["id"],
            messages=tuple(Message(m["role"], m["content"]) for m in record["messages"]),
            source=record["source"],
            license=record["license"],
            group=record["group"],
            tags=dict(record["tags"]),
            origin=record["origin"],
        )
        for record in table.to_pylist()
    ]


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
