"""The record: one conversation example, and the Parquet file that carries many."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

from stages.common.artifacts import atomic_write, missing
from stages.common.errors import InputError
from stages.common.messages import Message, Tool, ToolCall, find_conversation_problem
from stages.common.spool import pick, spool

ORIGINS = ("human", "template", "synthetic", "feedback")
Columns = frozenset[str]  # the groups of columns that only some files have: tools, preferences
ROWS_A_BATCH = 2000  # written and read at a time: a row may hold a passage


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation that ends with the answer to learn.

    Attributes:
        id: hash of the messages: the same conversation has the same id everywhere.
        source: where it came from; license: the SPDX id under which it may be used.
        group: rows of one group stay on one side of a split (expansions of one template).
        tags: free keys and values: intent, language, platform.
        origin: one of `ORIGINS`.
        tools: the functions that the assistant may call in this conversation, in their order in the prompt.
        rejected: an answer that people found worse than the last message; None where none is known.
        is_desirable: whether people found the last message good; None where no one rated it. Of a row with
            False the last message is no answer to learn: such rows are kept apart (`separate_refused`).
    """

    id: str
    messages: tuple[Message, ...]
    source: str
    license: str
    group: str
    tags: Mapping[str, str] = field(default_factory=dict)
    origin: str = "human"
    tools: tuple[Tool, ...] = ()
    rejected: Message | None = None
    is_desirable: bool | None = None

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All turns before the answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The last turn, which is the assistant's, as the text that is judged (`Message.answer`)."""
        return self.messages[-1].answer

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
    tools: Sequence[Tool] = (),
    rejected: Message | None = None,
    is_desirable: bool | None = None,
) -> Row:
    """Build a row from its messages, tools and rejected answer; the id follows from them.

    A row without a group is its own group.

    Raises:
        ValueError: the messages are no conversation to learn from; the message has the reason.
    """
    problem = find_conversation_problem(messages)
    if problem:
        raise ValueError(problem)
    if rejected is not None and (problem := find_conversation_problem([*messages[:-1], rejected])):
        raise ValueError(f"the rejected answer: {problem}")
    # What a row does not have is not part of its id.
    worse = [{"rejected": _identify(rejected)}] if rejected else []
    parts = [*map(_identify, messages), *(tool.text for tool in tools), *worse]
    digest = hashlib.sha256(format_canonical_json(parts).encode()).hexdigest()[:16]
    return Row(
        id=digest,
        messages=tuple(messages),
        source=source,
        license=license,
        group=group or digest,
        tags=dict(sorted((tags or {}).items())),
        origin=origin,
        tools=tuple(tools),
        rejected=rejected,
        is_desirable=is_desirable,
    )


def _identify(message: Message) -> list[Any]:
    """Return what makes a turn another one; what a turn without calls does not have is not part of it."""
    calls = [[call.name, call.arguments, call.id] for call in message.tool_calls]
    more = {
        "calls": calls or None,
        "result_of": message.tool_call_id,
        "reasoning": message.reasoning,
        "learned": None if message.is_learned is not False else False,
    }
    extra = {key: value for key, value in more.items() if value is not None}
    return [message.role, message.content, *([extra] if extra else [])]


def format_reject(row: Row, reason: str, detail: str) -> str:
    """Return the line of a file of rejects: a JSON object with id, reason, detail and row."""
    fields = {**asdict(row), "tags": dict(row.tags)}
    for name in ("rejected", "is_desirable"):
        if fields[name] is None:
            del fields[name]
    line = {"id": row.id, "reason": reason, "detail": detail, "row": fields}
    return json.dumps(line, ensure_ascii=False) + "\n"


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as Parquet, all or nothing; equal rows give equal bytes.

    The columns of tools and calls, and those of preferences, are there only if a row has some.
    """
    rest = iter(rows)
    batches = iter(lambda: list(islice(rest, ROWS_A_BATCH)), [])
    columns: Columns = frozenset()
    with atomic_write(path) as temporary:
        wider = _write_batches(temporary, columns, batches)
        while wider is not None:
            columns |= _list_columns(wider)
            wide = temporary.with_name(f"{temporary.name}-wide")
            try:
                before = (batch.to_pylist() for batch in _iterate(temporary))
                done = ([_from_record(record) for record in records] for records in before)
                wider = _write_batches(wide, columns, chain(done, [wider], batches))
                wide.replace(temporary)
            finally:
                wide.unlink(missing_ok=True)


def _write_batches(path: Path, columns: Columns, batches: Iterable[list[Row]]) -> list[Row] | None:
    """Write batches until one needs more columns, which is returned unwritten; None if all are written."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(columns)
    # Some at a time: as Arrow's columns the rows take their memory a second time.
    with pq.ParquetWriter(path, schema, compression="zstd") as file:
        for batch in batches:
            if _list_columns(batch) - columns:
                return batch
            file.write_table(pa.Table.from_pylist([_to_record(row) for row in batch], schema=schema))
    return None


def _list_columns(rows: Sequence[Row]) -> Columns:
    """Return which columns these rows need besides those that every file has."""
    turns = [message for row in rows for message in (*row.messages, row.rejected) if message]
    has_tools = any(row.tools for row in rows) or any(message.has_tools for message in turns)
    has_preferences = any(row.rejected or row.is_desirable is not None for row in rows)
    return frozenset([*["tools"] * has_tools, *["preferences"] * has_preferences])


def _iterate(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(ROWS_A_BATCH)


def _to_record(row: Row) -> dict[str, Any]:
    """Return a row as plain values; what a file's schema has no column for is not written."""
    values = {name: getattr(row, name) for name in ("id", "source", "license", "group", "origin")}
    return {
        **values,
        "messages": [_to_turn(message) for message in row.messages],
        "tags": sorted(row.tags.items()),
        "tools": [tool.text for tool in row.tools],
        "rejected": _to_turn(row.rejected) if row.rejected else None,
        "is_desirable": row.is_desirable,
    }


def _to_turn(message: Message) -> dict[str, Any]:
    calls = [{"name": call.name, "arguments": call.arguments, "id": call.id} for call in message.tool_calls]
    return {**{name: getattr(message, name) for name in _TURN_COLUMNS}, "tool_calls": calls}


def count_chars(row: Row) -> int:
    """Return the characters of a row's messages."""
    return sum(
        len(message.content)
        + len(message.reasoning or "")
        + sum(len(call.arguments) for call in message.tool_calls)
        for message in (*row.messages, row.rejected)
        if message
    )


def separate_refused(rows: Sequence[Row]) -> tuple[Sequence[Row], Sequence[Row]]:
    """Return the rows whose answer is right as far as known, and those whose answer was refused."""
    refused = [number for number, row in enumerate(rows) if row.is_desirable is False]
    if not refused:
        return rows, []
    apart = set(refused)
    return pick(rows, [number for number in range(len(rows)) if number not in apart]), pick(rows, refused)


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
            if file.schema_arrow not in map(_schema, _COLUMNS):
                raise InputError(
                    f"{path} has the columns {file.schema_arrow.names}, not {_schema(frozenset()).names}",
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
        messages=tuple(map(_to_message, record["messages"])),
        source=sys.intern(record["source"]),
        license=sys.intern(record["license"]),
        group=record["group"],
        tags=dict(record["tags"]),
        origin=sys.intern(record["origin"]),
        # One text for all conversations with the same tools.
        tools=tuple(Tool(sys.intern(text)) for text in record.get("tools", ())),
        rejected=_to_message(record["rejected"]) if record.get("rejected") else None,
        is_desirable=record.get("is_desirable"),
    )


def _to_message(turn: Mapping[str, Any]) -> Message:
    calls = tuple(
        ToolCall(call["name"], call["arguments"], call["id"]) for call in turn.get("tool_calls", ())
    )
    more = {name: turn.get(name) for name in _TURN_COLUMNS[2:]}
    return Message(sys.intern(turn["role"]), turn["content"], calls, **more)


_TURN_COLUMNS = ("role", "content", "tool_call_id", "reasoning", "is_learned")


_COLUMNS: tuple[Columns, ...] = tuple(
    frozenset(names) for names in ((), ("tools",), ("preferences",), ("tools", "preferences"))
)


@lru_cache(maxsize=len(_COLUMNS))
def _schema(columns: Columns) -> Any:
    import pyarrow as pa

    text = pa.string()
    turn = [("role", text), ("content", text)]
    if "tools" in columns:
        call = pa.struct([("name", text), ("arguments", text), ("id", text)])
        turn += [
            ("tool_calls", pa.list_(call)),
            ("tool_call_id", text),
            ("reasoning", text),
            ("is_learned", pa.bool_()),
        ]
    preferences = [("rejected", pa.struct(turn)), ("is_desirable", pa.bool_())]
    return pa.schema(
        [
            ("id", text),
            ("messages", pa.list_(pa.struct(turn))),
            ("source", text),
            ("license", text),
            ("group", text),
            ("tags", pa.map_(text, text)),
            ("origin", text),
            *([("tools", pa.list_(text))] if "tools" in columns else []),
            *(preferences if "preferences" in columns else []),
        ]
    )
