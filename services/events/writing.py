"""The store at work in a service: one thread writes; events that arrive together share a commit."""

from __future__ import annotations

import asyncio
import math
import queue
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from sqlalchemy import URL, Connection, Engine, delete, exists, select

from services.events.database import (
    FileIds,
    check_url,
    file_ids,
    is_store_failure,
    make_engine,
    reason_of,
    shown,
)
from services.events.migrations import problem
from services.events.opening import migrate_store, reached
from services.events.redaction import redact, redact_json
from services.events.schema import (
    EVENT_FIELDS,
    EVENT_VALUES,
    INSERTS,
    REDACTED,
    TABLES,
    BadEvent,
    Event,
    Feedback,
    StoreUnavailable,
    exchanges,
    feedback,
)
from stages.common.logs import get_logger

log = get_logger("events")

RETRY_S = 2.0  # how long a healthy store tries a group again before its callers are told
PROBE_S = 1.0  # how often a broken store without events looks whether it can write again
STALLED_S = 10.0  # a group that is written for longer is a broken store
COMMIT_WITHIN_S = 30.0  # a caller waits no longer

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
    with reached(parsed, StoreUnavailable):
        migrate_store(parsed)
    return EventStore(parsed, queue_size, group_rows, group_wait_s, redact, retry_s)


class EventStore:
    """A store at work: `record` events, check it with `find_problem`, `close` it. Made by `open_store`."""

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

    def find_problem(self) -> str | None:
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
