"""Write events: one thread writes, and events that arrive together share a commit."""

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

from sqlalchemy import URL, Connection, Engine, delete, select

from services.events.database import (
    FileIds,
    check_url,
    describe_error,
    get_file_ids,
    is_store_failure,
    make_engine,
    mask_password,
)
from services.events.migrations import find_version_problem
from services.events.opening import migrate_store, translate_errors
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
    count_chars,
    exchanges,
    feedback,
)
from stages.common.logs import get_logger
from stages.common.privacy.redaction import redact, redact_json

logger = get_logger("events")

RETRY_S = 2.0  # how long a healthy store retries a group before its callers get an error
PROBE_S = 1.0  # how often a failed store without events checks whether it can write again
# Of the texts of one group; those that take longest to redact, JSON of short strings, take about a second.
GROUP_CHARS = 200_000
STALLED_S = 10.0  # writing a group for longer than this counts as a failure
COMMIT_WITHIN_S = 30.0  # how long a caller waits

Pending = tuple[Event, asyncio.AbstractEventLoop, "asyncio.Future[None]"]
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
    """Open the store at `url`, upgrade its schema, and start its writer.

    Args:
        queue_size: events that may wait; more are rejected.
        group_rows: most events per commit.
        group_wait_s: how long a commit waits for further events after its first.
        redact: replaces personal data in a text; also applied inside JSON.
        retry_s: how long a group is retried before its callers get an error.

    Raises:
        InputError: the URL is not valid, or the database is newer than the code.
        StoreUnavailable: the database cannot be reached or written.
    """
    parsed = check_url(url)
    with translate_errors(parsed, StoreUnavailable):
        migrate_store(parsed)
    return EventStore(parsed, queue_size, group_rows, group_wait_s, redact, retry_s)


class EventStore:
    """A running store, made by `open_store`: `record` events, `find_problem`, `close`."""

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
        self._queue: queue.SimpleQueue[Pending | None] = queue.SimpleQueue()
        self._queue_size, self._group_rows, self._group_wait_s = queue_size, group_rows, group_wait_s
        self._redact, self._retry_s = redact, retry_s
        self._lock = threading.Lock()  # so that nothing is queued after the None that ends the queue
        self._closed = False
        self._problem: str | None = None
        self._writing_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="event-writer", daemon=True)
        self._thread.start()

    async def record(self, event: Event) -> None:
        """Store `event`; return once it is committed.

        Raises:
            StoreUnavailable: the queue is full, or the database cannot be written.
            BadEvent: the id exists already, or a value does not fit its column.
        """
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        with self._lock:
            if self._closed:
                raise StoreUnavailable("the event store is closed")
            if self._queue.qsize() >= self._queue_size:
                raise StoreUnavailable(f"{self._queue_size} events are waiting to be written")
            self._queue.put((event, loop, future))
        try:
            async with asyncio.timeout(COMMIT_WITHIN_S):
                await future
        except TimeoutError:
            raise StoreUnavailable(f"the event was not committed within {COMMIT_WITHIN_S:g} s") from None

    def find_problem(self) -> str | None:
        """Return why events cannot be stored, or None."""
        if self._closed:
            return "the event store is closed"
        since = self._writing_since
        if since is not None and (seconds := time.monotonic() - since) > STALLED_S:
            return f"the database has not responded for {seconds:.0f} s"
        return self._problem

    def find_request(self, request_id: str) -> tuple[str, str] | None:
        """Return route and parameters, as JSON, of an answered request; None if there is no such answer.

        Raises:
            StoreUnavailable: the database cannot be read.
        """
        wanted = (exchanges.c.request_id == _storable(request_id)) & exchanges.c.answer.is_not(None)
        query = select(exchanges.c.route, exchanges.c.parameters).where(wanted)
        try:
            with self._engine.connect() as connection:
                found = connection.execute(query).first()
        except Exception as error:
            raise StoreUnavailable(describe_error(error)) from error
        return None if found is None else (found[0], found[1])

    def close(self) -> None:
        """Write the waiting events, and stop the writer."""
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
                _notify(group, self._store_group(group))
            elif not ending:
                self._probe()
        self._writer.disconnect()

    def _next_group(self) -> tuple[list[Pending], bool]:
        """Wait for events; return them (none: time to probe), and whether the store is closing."""
        group: list[Pending] = []
        chars = 0
        try:
            pending = self._queue.get(timeout=PROBE_S if self._problem else None)
            # One sleep instead of a wait per event: every wake-up takes the GIL from the event loop.
            if pending is not None and self._queue.qsize() < self._group_rows - 1:
                time.sleep(self._group_wait_s)
            while pending is not None:
                group.append(pending)
                chars += count_chars(pending[0])
                if len(group) == self._group_rows or chars > GROUP_CHARS:
                    return group, False
                pending = self._queue.get_nowait()
        except queue.Empty:
            return group, False
        return group, True

    def _store_group(self, group: Sequence[Pending]) -> list[Exception | None]:
        """Write a group; return an error, or None, for each event."""
        try:
            outcomes: dict[int, Exception | None] = {}
            rows: dict[int, Row] = {}
            for number, (event, _, _) in enumerate(group):
                try:
                    rows[number] = type(event), _row(event, self._redact)
                except Exception as error:
                    outcomes[number] = BadEvent(f"the event cannot be stored: {error!r}")
            self._writing_since = time.monotonic()  # to redact is not the database's time
            stored = self._write_with_retries(list(rows.values())) if rows else []
            outcomes.update(zip(rows, stored, strict=True))
            return [outcomes[number] for number in range(len(group))]
        except Exception as error:  # a bug must not end the only writer, nor leave callers waiting
            logger.exception("the event writer failed")
            self._writer.disconnect()
            return [StoreUnavailable(repr(error)) for _ in group]
        finally:
            self._writing_since = None

    def _write_with_retries(self, rows: Sequence[Row]) -> list[Exception | None]:
        """Write rows; retry if the store fails, unless it had failed before."""
        until = time.monotonic() + (0.0 if self._problem else self._retry_s)
        pause, retrying = 0.05, False
        while True:
            try:
                outcomes = self._writer.write(rows, retrying)
            except Exception as error:
                self._writer.disconnect()
                if time.monotonic() + pause > until:
                    self._mark_failed(error)
                    return [StoreUnavailable(self._problem) for _ in rows]
            else:
                self._mark_healthy()
                return outcomes
            time.sleep(pause)
            pause, retrying = min(2 * pause, 0.5), True

    def _probe(self) -> None:
        try:
            self._writer.probe()
        except Exception as error:
            self._writer.disconnect()
            self._mark_failed(error)
        else:
            self._mark_healthy()

    def _mark_failed(self, error: Exception) -> None:
        if self._problem is None:
            logger.error("the event store cannot write: %s", describe_error(error))
        self._problem = describe_error(error)

    def _mark_healthy(self) -> None:
        if self._problem is not None:
            logger.info("the event store can write again")
        self._problem = None


class _Writer:
    """The writing connection, used by the writer's thread only."""

    def __init__(self, engine: Engine, url: URL) -> None:
        self._engine, self._url = engine, url
        self._connection: Connection | None = None
        self._files: FileIds = ()

    def write(self, rows: Sequence[Row], retrying: bool) -> list[Exception | None]:
        """Commit rows; return an error for each row that the database rejected.

        Args:
            retrying: an earlier attempt failed but may have been committed, so an equal row that exists
                already is not a duplicate.

        Raises:
            Exception: the database failed; no row counts as stored.
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
                outcomes = [_write_one(connection, *row, retrying) for row in rows]
        self._check_files()
        return outcomes

    def probe(self) -> None:
        """Insert and delete a row, in one transaction.

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
        """Close all connections; the next write opens a new one."""
        if self._connection is not None:
            try:
                self._connection.close()
            except Exception as error:
                logger.debug("closing: %s", error)
                self._connection.invalidate()
            self._connection = None
        self._engine.dispose()

    def _connected(self) -> Connection:
        if self._connection is None:
            connection = self._engine.connect().execution_options(writes=True)
            try:
                with connection.begin():
                    older = find_version_problem(connection, mask_password(self._url))
                    self._files = get_file_ids(self._url)
                if older or None in self._files:
                    raise OSError(older or f"the file of {mask_password(self._url)} is missing")
            except Exception:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _check_files(self) -> None:
        if get_file_ids(self._url) != self._files:
            raise OSError(f"the file of {mask_password(self._url)} was deleted or replaced")


def _kind(row: Row) -> bool:
    return row[0] is Feedback


def _kind_of(row: Row) -> type[Event]:
    return row[0]


def _write_one(
    connection: Connection, kind: type[Event], row: dict[str, Any], retrying: bool
) -> Exception | None:
    """Insert one row in a savepoint, so that the transaction survives a rejected row."""
    try:
        with connection.begin_nested():
            connection.execute(INSERTS[kind], row)
        return None
    except Exception as error:
        if is_store_failure(error):
            raise
        rejection = error
    table, key = TABLES[kind], EVENT_FIELDS[kind][0]
    existing = None
    if isinstance(row[key], str):
        existing = connection.execute(select(table).where(table.c[key] == row[key])).mappings().first()
    if existing is None:
        return BadEvent(f"the event {row[key]!r} cannot be stored: {describe_error(rejection)}")
    if retrying and dict(existing) == row:
        return None
    return BadEvent(f"{key} {row[key]!r} exists already")


def _row(event: Event, redact: Callable[[str], str]) -> dict[str, Any]:
    """Return the row of an event: redacted, and with storable values."""
    kind = type(event)
    row = dict(zip(EVENT_FIELDS[kind], EVENT_VALUES[kind](event), strict=True))
    for name in REDACTED:
        text = row.get(name)
        if text:  # an answer may be JSON, and must stay valid JSON
            row[name] = redact_json(text, redact) if text.lstrip()[:1] in ("{", "[") else redact(text)
    for name, value in row.items():
        if type(value) is str:
            if not value.isascii() or "\0" in value:
                row[name] = _storable(value)
        elif type(value) is float and math.isnan(value):
            row[name] = None  # as SQLite does; PostgreSQL would store NaN, which spoils every mean
    return row


def _storable(text: str) -> str:
    """Replace what PostgreSQL or UTF-8 cannot store: NUL and lone surrogates."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def _notify(group: Sequence[Pending], outcomes: Sequence[Exception | None]) -> None:
    """Notify all callers of a group, with one wake-up per event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[None], Exception | None]]] = {}
    for (_, loop, future), outcome in zip(group, outcomes, strict=True):
        by_loop.setdefault(loop, []).append((future, outcome))
    for loop, settled in by_loop.items():
        try:
            loop.call_soon_threadsafe(_settle, settled)
        except RuntimeError:  # the loop is closed, so no caller waits
            logger.debug("%d callers have gone", len(settled))


def _settle(settled: Sequence[tuple[asyncio.Future[None], Exception | None]]) -> None:
    for future, error in settled:
        if future.done():  # cancelled meanwhile
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
