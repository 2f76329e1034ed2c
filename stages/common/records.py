"""The record: one conversation example, and the Parquet file that carries many."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    """

    id: str
    messages: tuple[Message, ...]
    source: str
    license: str
    group: str
    tags: Mapping[str, str] = field(default_factory=dict)
    origin: str = "human"
    tools: tuple[Tool, ...] = ()

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
) -> Row:
    """Build a row from its messages and tools; the id follows from them, and the group from the id.

    Raises:
        ValueError: the messages are no conversation to learn from; the message has the reason.
    """
    problem = find_conversation_problem(messages)
    if problem:
        raise ValueError(problem)
    digest = hashlib.sha256(
        format_canonical_json([*map(_identify, messages), *(tool.text for tool in tools)]).encode()
    ).hexdigest()[:16]
    return Row(
        id=digest,
        messages=tuple(messages),
        source=source,
        license=license,
        group=group or digest,
        tags=dict(sorted((tags or {}).items())),
        origin=origin,
        tools=tuple(tools),
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
    line = {"id": row.id, "reason": reason, "detail": detail, "row": {**asdict(row), "tags": dict(row.tags)}}
    return json.dumps(line, ensure_ascii=False) + "\n"


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as Parquet, all or nothing; equal rows give equal bytes.

    The columns of tools and calls are there only if a row has some.
    """
    rest = iter(rows)
    batches = iter(lambda: list(islice(rest, ROWS_A_BATCH)), [])
    with atomic_write(path) as temporary:
        first_with_tools = _write_batches(temporary, _schema(), batches, stop=_has_tools)
        if first_with_tools is not None:
            wide = temporary.with_name(f"{temporary.name}-tools")
            try:
                before = (batch.to_pylist() for batch in _iterate(temporary))
                done = ([_from_record(record) for record in records] for records in before)
                _write_batches(wide, _schema(with_tools=True), chain(done, [first_with_tools], batches))
                wide.replace(temporary)
            finally:
                wide.unlink(missing_ok=True)


def _write_batches(
    path: Path,
    schema: Any,
    batches: Iterable[list[Row]],
    stop: Callable[[list[Row]], bool] = lambda rows: False,
) -> list[Row] | None:
    """Write batches until `stop` holds for one, which is returned unwritten; None if all are written."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Some at a time: as Arrow's columns the rows take their memory a second time.
    with pq.ParquetWriter(path, schema, compression="zstd") as file:
        for batch in batches:
            if stop(batch):
                return batch
            file.write_table(pa.Table.from_pylist([_to_record(row) for row in batch], schema=schema))
    return None


def _has_tools(rows: Sequence[Row]) -> bool:
    return any(row.tools or any(message.has_tools for message in row.messages) for row in rows)


def _iterate(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(ROWS_A_BATCH)


def _to_record(row: Row) -> dict[str, Any]:
    """Return a row as plain values; what a file's schema has no column for is not written."""
    values = {name: getattr(row, name) for name in ("id", "source", "license", "group", "origin")}
    messages = [
        {
            **{name: getattr(message, name) for name in _TURN_COLUMNS},
            "tool_calls": [
                {"name": call.name, "arguments": call.arguments, "id": call.id} for call in message.tool_calls
            ],
        }
        for message in row.messages
    ]
    return {
        **values,
        "messages": messages,
        "tags": sorted(row.tags.items()),
        "tools": [tool.text for tool in row.tools],
    }


def count_chars(row: Row) -> int:
    """Return the characters of a row's messages."""
    return sum(
        len(message.content)
        + len(message.reasoning or "")
        + sum(len(call.arguments) for call in message.tool_calls)
        for message in row.messages
    )


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
            if file.schema_arrow not in (_schema(), _schema(with_tools=True)):
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
        messages=tuple(map(_to_message, record["messages"])),
        source=sys.intern(record["source"]),
        license=sys.intern(record["license"]),
        group=record["group"],
        tags=dict(record["tags"]),
        origin=sys.intern(record["origin"]),
        # One text for all conversations with the same tools.
        tools=tuple(Tool(sys.intern(text)) for text in record.get("tools", ())),
    )


def _to_message(turn: Mapping[str, Any]) -> Message:
    calls = tuple(
        ToolCall(call["name"], call["arguments"], call["id"]) for call in turn.get("tool_calls", ())
    )
    more = {name: turn.get(name) for name in _TURN_COLUMNS[2:]}
    return Message(sys.intern(turn["role"]), turn["content"], calls, **more)


_TURN_COLUMNS = ("role", "content", "tool_call_id", "reasoning", "is_learned")


@lru_cache(maxsize=2)
def _schema(with_tools: bool = False) -> Any:
    import pyarrow as pa

    text = pa.string()
    turn = [("role", text), ("content", text)]
    if with_tools:
        call = pa.struct([("name", text), ("arguments", text), ("id", text)])
        turn += [
            ("tool_calls", pa.list_(call)),
            ("tool_call_id", text),
            ("reasoning", text),
            ("is_learned", pa.bool_()),
        ]
    return pa.schema(
        [
            ("id", text),
            ("messages", pa.list_(pa.struct(turn))),
            ("source", text),
            ("license", text),
            ("group", text),
            ("tags", pa.map_(text, text)),
            ("origin", text),
            *([("tools", pa.list_(text))] if with_tools else []),
        ]
    )
