"""The event store: every request with its answer, and what people said of it, kept for good.

An event counts as recorded when its transaction is on the disk. One thread writes; events that
arrive together share a commit. Other processes read at the same time.

Run: `python -m services.events export --from 2026-01-01T00:00 --to 2026-02-01T00:00 --out january.parquet`,
`python -m services.events prune --older-than-days 90` or `python -m services.events migrate`
"""

from __future__ import annotations

import argparse
import asyncio
import math
import queue
import sqlite3
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sqlalchemy import (
    URL,
    Boolean,
    CheckConstraint,
    Column,
    Connection,
    Double,
    Engine,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    case,
    delete,
    exists,
    func,
    insert,
    literal,
    select,
    tuple_,
)
from sqlalchemy.exc import SQLAlchemyError

from services.database import (
    FileIds,
    check_url,
    file_ids,
    is_store_failure,
    make_engine,
    reason_of,
    shown,
    sqlite_path,
)
from services.migrations import migrate, problem
from services.redaction import redact, redact_json
from stages.common.artifacts import replacing
from stages.common.errors import InputError
from stages.common.logs import get_logger, run_stage

if TYPE_CHECKING:
    import pyarrow as pa

log = get_logger("events")

RETRY_S = 2.0  # how long a healthy store tries a group again before its callers are told
PROBE_S = 1.0  # how often a broken store without events looks whether it can write again
STALLED_S = 10.0  # a group that is written for longer is a broken store
COMMIT_WITHIN_S = 30.0  # a caller waits no longer
PAGE_ROWS = 1000  # read with one query, deleted with one transaction
PAGE_TIMES = 20_000  # read with one query where only times are
PAGE_CHARS = 16_000_000  # a page of long texts ends here


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and its answer, or its refusal.

    Attributes:
        received_at: unix time, s.
        role: "champion", "challenger" or "shadow" (answered, not shown).
        shadow_of: request_id of the answer that was shown instead.
        messages: JSON, parameters: JSON, verdicts: JSON {check: [allow, reason]}.
        status: of HTTP; reason: code of the refusal or error.
    """

    request_id: str
    received_at: float
    route: str
    key_id: str | None
    user: str | None
    session: str | None
    role: str
    shadow_of: str | None
    model: str
    version: str
    messages: str
    parameters: str
    status: int
    reason: str | None
    answer: str | None
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    queue_s: float
    first_token_s: float | None
    total_s: float
    verdicts: str
    valid_output: bool | None
    mean_logprob: float | None


@dataclass(frozen=True, slots=True)
class Feedback:
    """What somebody said of an answer; `given_at` is unix time in s, `thumb` is 1 or -1."""

    feedback_id: str
    request_id: str
    given_at: float
    key_id: str | None
    thumb: int | None
    correction: str | None
    comment: str | None


Event = Exchange | Feedback
EVENT_FIELDS = {kind: tuple(field.name for field in fields(kind)) for kind in (Exchange, Feedback)}
EVENT_VALUES = {kind: attrgetter(*names) for kind, names in EVENT_FIELDS.items()}
REDACTED = ("messages", "answer", "correction", "comment")

metadata = MetaData()
COLUMN_TYPES = {"str": Text, "float": Double, "int": Integer, "bool": Boolean}


def _columns(kind: type[Event]) -> list[Column[Any]]:
    """Return a column for each field, the first as the key; the migrations say the same, a test holds it."""
    columns: list[Column[Any]] = []
    for number, field in enumerate(fields(kind)):
        name, _, optional = str(field.type).partition(" | ")
        columns.append(
            Column(field.name, COLUMN_TYPES[name], primary_key=number == 0, nullable=bool(optional))
        )
    return columns


exchanges = Table(
    "exchanges", metadata, *_columns(Exchange), Index("exchanges_by_time", "received_at", "request_id")
)
feedback = Table(
    "feedback",
    metadata,
    *_columns(Feedback),
    Index("feedback_by_time", "given_at", "feedback_id"),
    Index("feedback_by_request", "request_id"),
    CheckConstraint("thumb IN (1, -1)", name="thumb_is_up_or_down"),
)
TABLES = {Exchange: exchanges, Feedback: feedback}
INSERTS = {kind: insert(table) for kind, table in TABLES.items()}


class StoreUnavailable(Exception):
    """The event was not recorded, because of the store and not of the event; the text says why.

    After a timeout or a lost connection it may have been recorded all the same.
    """


class BadEvent(ValueError):
    """The store refuses this event for good: its id is there already, or a value is none for its column."""


Waiting = tuple[Event, asyncio.AbstractEventLoop, "asyncio.Future[None]"]
Row = tuple[type[Event], dict[str, Any]]


def open_store(
    url: str,
    *,
    queue_size: int,
    group_rows: int,
    group_wait_s: float,
    redact: Callable[[str], str] = redact,
    retry_s: float = RETRY_S,
) -> EventStore:
    """Open the store at `url`, bring its schema up to date, and start its writer.

    Args:
        queue_size: events that may wait; more are refused.
        group_rows: written with one commit at most.
        group_wait_s: how long a group waits for company after its first event.
        redact: replaces personal data in a text; used inside of JSON too.
        retry_s: how long a group is tried again before its callers are told.

    Raises:
        InputError: the URL is wrong, or the database is newer than the code.
        StoreUnavailable: the database cannot be reached or written.
    """
    parsed = check_url(url)
    with _reached(parsed, StoreUnavailable):
        _migrate(parsed)
    return EventStore(parsed, queue_size, group_rows, group_wait_s, redact, retry_s)


def _migrate(url: URL) -> bool:
    path = sqlite_path(url)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    engine = make_engine(url, create=True)
    try:
        return migrate(engine, shown(url))
    finally:
        engine.dispose()


class EventStore:
    """A store at work: `record` events, ask its `health`, `close` it. Made by `open_store`."""

    def __init__(
        self,
        url: URL,
        queue_size: int,
        group_rows: int,
        group_wait_s: float,
        redact: Callable[[str], str],
        retry_s: float,
    ) -> None:
        self._engine = make_engine(url)
        self._writer = _Writer(self._engine, url)
        self._queue: queue.SimpleQueue[Waiting | None] = queue.SimpleQueue()
        self._queue_size, self._group_rows, self._group_wait_s = queue_size, group_rows, group_wait_s
        self._redact, self._retry_s = redact, retry_s
        self._lock = threading.Lock()  # nothing enters the queue behind the None that ends it
        self._closed = False
        self._problem: str | None = None
        self._writing_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="event-writer", daemon=True)
        self._thread.start()

    async def record(self, event: Event) -> None:
        """Store `event`; return once it is committed.

        Raises:
            StoreUnavailable: the queue is full, or the database cannot be written.
            BadEvent: the id is stored already, or a value does not fit.
        """
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        with self._lock:
            if self._closed:
                raise StoreUnavailable("the event store is closed")
            if self._queue.qsize() >= self._queue_size:
                raise StoreUnavailable(f"{self._queue_size} events wait to be written already")
            self._queue.put((event, loop, future))
        try:
            async with asyncio.timeout(COMMIT_WITHIN_S):
                await future
        except TimeoutError:
            raise StoreUnavailable(f"the event was not committed within {COMMIT_WITHIN_S:g} s") from None

    def health(self) -> str | None:
        """Return None when the store is healthy, else the reason."""
        if self._closed:
            return "the event store is closed"
        since = self._writing_since
        if since is not None and (seconds := time.monotonic() - since) > STALLED_S:
            return f"the database has not answered for {seconds:.0f} s"
        return self._problem

    async def answer_exists(self, request_id: str) -> bool:
        """Return whether an answer to this request is stored.

        Raises:
            StoreUnavailable: the database cannot be read.
        """
        return await asyncio.to_thread(self._answer_exists, request_id)

    def _answer_exists(self, request_id: str) -> bool:
        try:
            with self._engine.connect() as connection:
                wanted = (exchanges.c.request_id == _storable(request_id)) & exchanges.c.answer.is_not(None)
                return bool(connection.execute(select(exists().where(wanted))).scalar())
        except Exception as error:
            raise StoreUnavailable(reason_of(error)) from error

    def close(self) -> None:
        """Write what waits, and end the writer."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        ending = False
        while not ending:
            group, ending = self._next_group()
            if group:
                _wake(group, self._outcomes(group))
            elif not ending:
                self._probe()
        self._writer.disconnect()

    def _next_group(self) -> tuple[list[Waiting], bool]:
        """Wait for events; return them, and whether the store ends. No events: time to probe."""
        group: list[Waiting] = []
        try:
            waiting = self._queue.get(timeout=PROBE_S if self._problem else None)
            # One sleep, and not a wait for each event: every wake-up takes the interpreter from the loop.
            if waiting is not None and self._queue.qsize() < self._group_rows - 1:
                time.sleep(self._group_wait_s)
            while waiting is not None:
                group.append(waiting)
                if len(group) == self._group_rows:
                    return group, False
                waiting = self._queue.get_nowait()
        except queue.Empty:
            return group, False
        return group, True

    def _outcomes(self, group: Sequence[Waiting]) -> list[Exception | None]:
        """Write a group; return an error for each event that is not stored."""
        self._writing_since = time.monotonic()
        try:
            outcomes: dict[int, Exception | None] = {}
            rows: dict[int, Row] = {}
            for number, (event, _, _) in enumerate(group):
                try:
                    rows[number] = type(event), _row(event, self._redact)
                except Exception as error:
                    outcomes[number] = BadEvent(f"the event cannot be stored: {error!r}")
            stored = self._write_stubbornly(list(rows.values())) if rows else []
            outcomes.update(zip(rows, stored, strict=True))
            return [outcomes[number] for number in range(len(group))]
        except (
            Exception
        ) as error:  # a mistake of ours must not end the only writer, nor leave callers waiting
            log.exception("the event writer failed")
            self._writer.disconnect()
            return [StoreUnavailable(repr(error)) for _ in group]
        finally:
            self._writing_since = None

    def _write_stubbornly(self, rows: Sequence[Row]) -> list[Exception | None]:
        """Write rows; try again for a while if the store fails, but not if it failed before already."""
        until = time.monotonic() + (0.0 if self._problem else self._retry_s)
        pause, again = 0.05, False
        while True:
            try:
                outcomes = self._writer.write(rows, again)
            except Exception as error:
                self._writer.disconnect()
                if time.monotonic() + pause > until:
                    self._broken(error)
                    return [StoreUnavailable(self._problem) for _ in rows]
            else:
                self._mended()
                return outcomes
            time.sleep(pause)
            pause, again = min(2 * pause, 0.5), True

    def _probe(self) -> None:
        try:
            self._writer.probe()
        except Exception as error:
            self._writer.disconnect()
            self._broken(error)
        else:
            self._mended()

    def _broken(self, error: Exception) -> None:
        if self._problem is None:
            log.error("the event store cannot write: %s", reason_of(error))
        self._problem = reason_of(error)

    def _mended(self) -> None:
        if self._problem is not None:
            log.info("the event store can write again")
        self._problem = None


class _Writer:
    """The one connection that writes, used by the writer's thread alone."""

    def __init__(self, engine: Engine, url: URL) -> None:
        self._engine, self._url = engine, url
        self._connection: Connection | None = None
        self._files: FileIds = ()

    def write(self, rows: Sequence[Row], again: bool) -> list[Exception | None]:
        """Commit rows; return an error for each that the database refused.

        Args:
            again: an earlier try failed and may have been committed nevertheless: a row that is
                there already, as it is, is then no duplicate but this very one.

        Raises:
            Exception: the database failed; nothing counts as stored.
        """
        connection = self._connected()
        try:
            with connection.begin():
                for kind, group in groupby(sorted(rows, key=_kind), key=_kind_of):
                    connection.execute(INSERTS[kind], [row for _, row in group])
            outcomes: list[Exception | None] = [None] * len(rows)
        except Exception as error:
            if is_store_failure(error):
                raise
            with connection.begin():
                outcomes = [_write_one(connection, *row, again) for row in rows]
        self._check_files()
        return outcomes

    def probe(self) -> None:
        """Commit something that nobody will see.

        Raises:
            Exception: the database cannot be written.
        """
        name = f"probe-{uuid.uuid4()}"
        row = dict.fromkeys(EVENT_FIELDS[Feedback]) | {"comment": "x" * 4096, "given_at": 0.0}
        connection = self._connected()
        with connection.begin():
            connection.execute(INSERTS[Feedback], row | {"feedback_id": name, "request_id": name})
            connection.execute(delete(feedback).where(feedback.c.feedback_id == name))
        self._check_files()

    def disconnect(self) -> None:
        """Let go of all connections; the next write makes a new one."""
        if self._connection is not None:
            try:
                self._connection.close()
            except Exception as error:
                log.debug("closing: %s", error)
                self._connection.invalidate()
            self._connection = None
        self._engine.dispose()

    def _connected(self) -> Connection:
        if self._connection is None:
            connection = self._engine.connect().execution_options(writes=True)
            try:
                with connection.begin():
                    older = problem(connection, shown(self._url))
                    self._files = file_ids(self._url)
                if older or None in self._files:
                    raise OSError(older or f"the file of {shown(self._url)} is gone")
            except Exception:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _check_files(self) -> None:
        if file_ids(self._url) != self._files:
            raise OSError(f"the file of {shown(self._url)} was deleted or replaced")


def _kind(row: Row) -> bool:
    return row[0] is Feedback


def _kind_of(row: Row) -> type[Event]:
    return row[0]


def _write_one(
    connection: Connection, kind: type[Event], row: dict[str, Any], again: bool
) -> Exception | None:
    """Insert one row inside of a transaction that goes on if the row is refused."""
    try:
        with connection.begin_nested():
            connection.execute(INSERTS[kind], row)
        return None
    except Exception as error:
        if is_store_failure(error):
            raise
        refusal = error
    table, key = TABLES[kind], EVENT_FIELDS[kind][0]
    there = None
    if isinstance(row[key], str):
        there = connection.execute(select(table).where(table.c[key] == row[key])).mappings().first()
    if there is None:
        return BadEvent(f"the event {row[key]!r} cannot be stored: {reason_of(refusal)}")
    if again and dict(there) == row:
        return None
    return BadEvent(f"{key} {row[key]!r} is stored already")


def _row(event: Event, redact: Callable[[str], str]) -> dict[str, Any]:
    """Return an event as what is stored of it."""
    kind = type(event)
    row = dict(zip(EVENT_FIELDS[kind], EVENT_VALUES[kind](event), strict=True))
    for name in REDACTED:
        text = row.get(name)
        if text:  # an answer may be JSON, and has to stay so
            row[name] = redact_json(text, redact) if text.lstrip()[:1] in ("{", "[") else redact(text)
    for name, value in row.items():
        if type(value) is str:
            if not value.isascii() or "\0" in value:
                row[name] = _storable(value)
        elif type(value) is float and math.isnan(value):
            row[name] = None  # SQLite makes it so; PostgreSQL would keep a number that no mean survives
    return row


def _storable(text: str) -> str:
    """Return text without what PostgreSQL or UTF-8 cannot hold: NUL, and halves of surrogate pairs."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def _wake(group: Sequence[Waiting], outcomes: Sequence[Exception | None]) -> None:
    """Tell all callers of a group, with one wake-up a loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[None], Exception | None]]] = {}
    for (_, loop, future), outcome in zip(group, outcomes, strict=True):
        by_loop.setdefault(loop, []).append((future, outcome))
    for loop, settled in by_loop.items():
        try:
            loop.call_soon_threadsafe(_settle, settled)
        except RuntimeError:  # the loop is closed: nobody waits
            log.debug("%d callers are gone", len(settled))


def _settle(settled: Sequence[tuple[asyncio.Future[None], Exception | None]]) -> None:
    for future, error in settled:
        if future.done():  # cancelled meanwhile
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)


def read_exchanges(url: str, start: float, end: float) -> Iterator[pa.RecordBatch]:
    """Yield the exchanges received in [start, end) (unix s), ordered by time; memory is bounded.

    Raises:
        InputError: there is no store at `url`, it is of another version, or cannot be read.
    """
    yield from _read(url, Exchange, start, end, with_feedback=False)


def read_feedback(url: str, start: float, end: float) -> Iterator[pa.RecordBatch]:
    """Yield the feedback given in [start, end) (unix s), ordered by time; else as `read_exchanges`."""
    yield from _read(url, Feedback, start, end, with_feedback=False)


def read_joined(url: str, start: float, end: float) -> Iterator[pa.RecordBatch]:
    """Yield exchanges as `read_exchanges`, with a column `feedback`: the list of all given on each."""
    yield from _read(url, Exchange, start, end, with_feedback=True)


def read_times(url: str, start: float, end: float, version: str, role: str) -> Iterator[float]:
    """Yield when the exchanges of one version in one role were received, in [start, end), in order; no texts.

    Raises:
        InputError: as `read_exchanges`.
    """
    key, at = exchanges.c.request_id, exchanges.c.received_at
    wanted = select(at, key).where(at >= start, at < end, *_answered_by(version, role))
    wanted = wanted.order_by(at, key).limit(PAGE_TIMES)
    after: tuple[float, str] | None = None
    with _opened(url) as engine:
        while True:
            page = wanted
            if after is not None:
                page = wanted.where(tuple_(at, key) > tuple_(literal(after[0]), literal(after[1])))
            with engine.connect() as connection:
                rows = connection.execute(page).all()
            yield from (row[0] for row in rows)
            if len(rows) < PAGE_TIMES:
                return
            after = rows[-1][0], rows[-1][1]


def count_exchanges(url: str, start: float, end: float, version: str, role: str) -> int:
    """Return how many exchanges `read_times` would yield.

    Raises:
        InputError: as `read_exchanges`.
    """
    at = exchanges.c.received_at
    wanted = select(func.count()).where(at >= start, at < end, *_answered_by(version, role))
    with _opened(url) as engine, engine.connect() as connection:
        return int(connection.execute(wanted).scalar_one())


def time_span(url: str) -> tuple[float, float] | None:
    """Return when the first and the last exchange were received (unix s); None for an empty store.

    Raises:
        InputError: as `read_exchanges`.
    """
    at = exchanges.c.received_at
    with _opened(url) as engine, engine.connect() as connection:
        # Two queries: each is one step in the index, and both ends in one query would read all of it.
        first, last = (
            connection.execute(select(at).order_by(order).limit(1)).scalar_one_or_none()
            for order in (at.asc(), at.desc())
        )
    return None if first is None or last is None else (float(first), float(last))


@dataclass(frozen=True, slots=True)
class Traffic:
    """What was asked, and what people said, in [start, end) (unix s); shadows do not count.

    Attributes:
        refused: answered with 4xx; failed: with 5xx.
        checked: answers whose form was checked; valid: those that kept to it.
        versions: version -> exchanges.
    """

    start: float
    end: float
    requests: int
    refused: int
    failed: int
    checked: int
    valid: int
    thumbs_up: int
    thumbs_down: int
    corrections: int
    versions: dict[str, int]


def count_traffic(url: str, spans: Iterable[tuple[float, float]]) -> Iterator[Traffic]:
    """Yield the counts of each [start, end) (unix s), as it is asked for; no texts are read.

    Raises:
        InputError: as `read_exchanges`.
    """
    at, status, valid = exchanges.c.received_at, exchanges.c.status, exchanges.c.valid_output
    sums = [
        func.count(),
        func.sum(case((status.between(400, 499), 1), else_=0)),
        func.sum(case((status >= 500, 1), else_=0)),
        func.count(valid),
        func.sum(case((valid.is_(True), 1), else_=0)),
    ]
    wanted = select(exchanges.c.version, *sums).where(exchanges.c.role != "shadow")
    wanted = wanted.group_by(exchanges.c.version)
    thumb, given = feedback.c.thumb, feedback.c.given_at
    said = select(
        func.sum(case((thumb == 1, 1), else_=0)),
        func.sum(case((thumb == -1, 1), else_=0)),
        func.count(feedback.c.correction),
    )
    with _opened(url) as engine, engine.connect() as connection:
        for start, end in spans:
            rows = connection.execute(wanted.where(at >= start, at < end)).all()
            told = connection.execute(said.where(given >= start, given < end)).one()
            connection.rollback()  # a long transaction would keep SQLite's log from being used again
            requests, refused, failed, checked, valid_ones = (
                sum(int(row[place]) for row in rows) for place in range(1, 6)
            )
            up, down, corrections = (int(value or 0) for value in told)
            versions = {str(row[0]): int(row[1]) for row in rows}
            yield Traffic(
                start, end, requests, refused, failed, checked, valid_ones, up, down, corrections, versions
            )


def _answered_by(version: str, role: str) -> tuple[Any, Any]:
    return exchanges.c.version == version, exchanges.c.role == role


def joined_schema() -> pa.Schema:
    """Return the columns of `read_joined`."""
    import pyarrow as pa

    told = pa.struct([field for field in _schema(feedback) if field.name != "request_id"])
    return _schema(exchanges).append(pa.field("feedback", pa.list_(told), nullable=False))


def _schema(table: Table) -> pa.Schema:
    import pyarrow as pa

    types = {Text: pa.string(), Double: pa.float64(), Integer: pa.int64(), Boolean: pa.bool_()}
    return pa.schema(
        [pa.field(c.name, types[type(c.type)], nullable=bool(c.nullable)) for c in table.columns]
    )


def _read(
    url: str, kind: type[Event], start: float, end: float, with_feedback: bool
) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    schema = joined_schema() if with_feedback else _schema(TABLES[kind])
    with _opened(url) as engine:
        after: tuple[float, str] | None = None
        while True:
            # Each page is a transaction of its own: a long one would keep SQLite's log from being used again.
            with engine.connect() as connection:
                rows = _page(connection, kind, start, end, after)
                told = _feedback_on(connection, [row[0] for row in rows]) if with_feedback and rows else {}
            if not rows:
                return
            columns: list[Any] = list(zip(*rows, strict=True))
            after = columns[_time_column(kind)][-1], columns[0][-1]
            if with_feedback:
                columns.append([told.get(row[0], []) for row in rows])
            arrays = [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)]
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def _time_column(kind: type[Event]) -> int:
    return EVENT_FIELDS[kind].index("received_at" if kind is Exchange else "given_at")


def _page(
    connection: Connection, kind: type[Event], start: float, end: float, after: tuple[float, str] | None
) -> list[tuple[Any, ...]]:
    table = TABLES[kind]
    key, at = table.columns[0], table.columns[_time_column(kind)]
    wanted = select(table).where(at >= start, at < end).order_by(at, key).limit(PAGE_ROWS)
    if after is not None:
        wanted = wanted.where(tuple_(at, key) > tuple_(literal(after[0]), literal(after[1])))
    rows: list[tuple[Any, ...]] = []
    chars = 0
    with connection.execute(wanted.execution_options(yield_per=100)) as result:
        for row in result:
            rows.append(tuple(row))
            chars += sum(len(value) for value in row if type(value) is str)
            if chars > PAGE_CHARS:
                break
    return rows


def _feedback_on(connection: Connection, request_ids: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    wanted = select(feedback).where(feedback.c.request_id.in_(request_ids))
    found: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in connection.execute(wanted.order_by(feedback.c.given_at, feedback.c.feedback_id)).mappings():
        found[row["request_id"]].append({name: row[name] for name in row if name != "request_id"})
    return found


def export_window(url: str, start: float, end: float, path: Path) -> int:
    """Write what `read_joined` yields as Parquet, all or nothing; return the number of exchanges.

    Raises:
        InputError: as `read_exchanges`.
    """
    import pyarrow.parquet as pq

    rows = 0
    with (
        replacing(path) as beside,
        pq.ParquetWriter(beside, joined_schema(), compression="zstd") as writer,
    ):
        for batch in read_joined(url, start, end):
            writer.write_batch(batch)
            rows += batch.num_rows
    return rows


@dataclass(frozen=True, slots=True)
class Pruned:
    """How many rows `prune` deleted."""

    exchanges: int
    feedback: int


def prune(url: str, before: float) -> Pruned:
    """Delete exchanges received before `before` (unix s) with the feedback on them, and return the counts.

    Feedback whose exchange is gone goes by its own time. Deletes in short transactions, between
    which the service can write; SQLite gives the freed pages back to the disk.

    Raises:
        InputError: as `read_exchanges`.
    """
    old_exchanges = select(exchanges.c.request_id).where(exchanges.c.received_at < before)
    orphan = ~exists().where(exchanges.c.request_id == feedback.c.request_id)
    old_feedback = select(feedback.c.feedback_id).where(feedback.c.given_at < before, orphan)
    with _opened(url) as engine:
        counts = [0, 0]
        for number, wanted in enumerate((old_exchanges, old_feedback)):
            while ids := _prune_some(engine, wanted, counts, bool(number)):
                log.debug("pruned %d", ids)
                time.sleep(0.005)  # SQLite's lock is not fair: a writer that waits for it needs a gap
        _give_back_pages(engine)
    return Pruned(*counts)


def _prune_some(engine: Engine, wanted: Any, counts: list[int], only_feedback: bool) -> int:
    with engine.execution_options(writes=True).begin() as connection:
        ids = list(connection.execute(wanted.limit(PAGE_ROWS)).scalars())
        if not only_feedback and ids:
            counts[1] += connection.execute(delete(feedback).where(feedback.c.request_id.in_(ids))).rowcount
        table = feedback if only_feedback else exchanges
        if ids:
            gone = connection.execute(delete(table).where(table.columns[0].in_(ids))).rowcount
            counts[1 if only_feedback else 0] += gone
    return len(ids)


def _give_back_pages(engine: Engine) -> None:
    """Shorten SQLite's file by its free pages, some at a time; PostgreSQL uses the space again itself."""
    if engine.dialect.name != "sqlite":
        return
    with engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        free, before = _free_pages(driver), None
        while free and free != before:  # a file that was made without it does not shrink
            driver.execute("PRAGMA incremental_vacuum(1000)").fetchall()  # a page is freed with each row
            free, before = _free_pages(driver), free


def _free_pages(driver: Any) -> int:
    return int(driver.execute("PRAGMA freelist_count").fetchone()[0])


@contextmanager
def _opened(url: str) -> Iterator[Engine]:
    """Yield an engine on a store that is there and of this code's version."""
    parsed = check_url(url)
    remedy = "start the service, or run python -m services.events migrate"
    path = sqlite_path(parsed)
    if path is not None and not path.exists():
        raise InputError(f"there is no event store at {path}", remedy)
    engine = make_engine(parsed)
    try:
        with _reached(parsed, InputError):
            with engine.connect() as connection:
                older = problem(connection, shown(parsed))
            if older:
                raise InputError(older, remedy)
            yield engine
    finally:
        engine.dispose()


@contextmanager
def _reached(url: URL, unavailable: type[StoreUnavailable] | type[InputError]) -> Iterator[None]:
    """Turn what the database says into an error of ours."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error, OSError) as error:
        text = f"the event store {shown(url)} cannot be used: {reason_of(error)}"
        if unavailable is InputError:
            raise InputError(text, "see that the database runs and its disk has space") from error
        raise StoreUnavailable(text) from error


class _OneLine(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = _OneLine(prog="python -m services.events", description="The event store.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="export | prune | migrate")
    export = commands.add_parser("export", help="write exchanges and feedback as Parquet")
    export.add_argument("--from", dest="start", type=_instant, required=True, help="2026-01-01T00:00, UTC")
    export.add_argument("--to", dest="end", type=_instant, required=True, help="not included")
    export.add_argument("--out", type=Path, required=True, help="the file to write")
    older = commands.add_parser("prune", help="delete old exchanges and their feedback")
    older.add_argument("--older-than-days", type=_days, required=True)
    commands.add_parser("migrate", help="make the store, or bring its schema up to date")
    for command in commands.choices.values():
        command.add_argument("--url", help="of the store; params.yaml services.events.url if not given")
    arguments = parser.parse_args(words)
    if arguments.command == "export" and arguments.start >= arguments.end:
        parser.error("--from is not before --to")
    return arguments


def _instant(word: str) -> float:
    try:
        instant = datetime.fromisoformat(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r} is no time like 2026-01-01T00:00") from None
    return (instant if instant.tzinfo else instant.replace(tzinfo=UTC)).timestamp()


def _days(word: str) -> float:
    try:
        days = float(word)
    except ValueError:
        days = math.nan
    if not 0 <= days < math.inf:
        raise argparse.ArgumentTypeError(f"{word!r} is no number of days")
    return days


def main(words: Sequence[str] | None = None) -> None:
    """Export, prune or migrate, as the arguments say."""
    arguments = _arguments(sys.argv[1:] if words is None else words)
    url = arguments.url or _url_of_params()
    if arguments.command == "export":
        rows = export_window(url, arguments.start, arguments.end, arguments.out)
        log.info("%d exchanges written to %s", rows, arguments.out)
    elif arguments.command == "prune":
        pruned = prune(url, time.time() - arguments.older_than_days * 86_400)
        log.info("deleted %d exchanges, %d feedback", pruned.exchanges, pruned.feedback)
    else:
        parsed = check_url(url)
        with _reached(parsed, InputError):
            changed = _migrate(parsed)
        log.info("%s %s", shown(parsed), "is up to date now" if changed else "was up to date")


def _url_of_params() -> str:
    from stages.common.params import load_params

    return load_params().services.events.url


if __name__ == "__main__":
    run_stage(main)
