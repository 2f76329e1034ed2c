"""The event store's database: what a URL means, and connections that keep what they commit."""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    DBAPIError,
    InternalError,
    OperationalError,
    ProgrammingError,
)

from stages.common.errors import InputError

SQLITE = ("sqlite", "sqlite+pysqlite")
POSTGRESQL = "postgresql+psycopg"
BUSY_S = 5.0  # how long SQLite waits for another process that writes
POSTGRESQL_ARGUMENTS = {
    "connect_timeout": 5,  # s
    # A server that has vanished from the network is noticed within this time, not within hours.
    "keepalives_idle": 10,  # s
    "keepalives_interval": 5,  # s
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,  # ms
    "application_name": "perennial",
    # A server or a role may be set to acknowledge before the disk has it.
    "options": "-c synchronous_commit=on",
}

# What says which files were opened: device and inode of the database and of its log.
FileIds = tuple[tuple[int, int] | None, ...]


def check_url(url: str) -> URL:
    """Return the parsed URL of an event store.

    Raises:
        InputError: it is no URL, or of a kind of database that is not served.
    """
    fix = "write sqlite:///path/to/events.db or postgresql+psycopg://user:password@host/database"
    try:
        parsed = make_url(url)
    except ArgumentError:  # the URL may hold a password: it is not repeated
        raise InputError("the event store's URL cannot be read", fix) from None
    if parsed.drivername not in (*SQLITE, POSTGRESQL):
        raise InputError(f"the event store's URL begins with {parsed.drivername!r}", fix)
    if parsed.drivername in SQLITE and (not sqlite_path(parsed) or parsed.query):
        raise InputError(f"the event store's URL {shown(parsed)} names no file, or has options", fix)
    return parsed


def shown(url: URL) -> str:
    """Return `url` without its password."""
    return url.render_as_string(hide_password=True)


def sqlite_path(url: URL) -> Path | None:
    """Return the file of a SQLite URL; None where there is none: in memory, or another database."""
    if url.drivername not in SQLITE or not url.database or url.database.startswith((":memory:", "file:")):
        return None
    return Path(url.database)


def make_engine(url: URL, create: bool = False) -> Engine:
    """Return an engine whose commits are on the disk when they return.

    Args:
        create: make SQLite's file if it is not there. A store at work never does: an empty file
            in the place of one that was lost would hide the loss.

    A transaction on a connection with the execution option `writes` takes SQLite's one write lock
    as it begins: a transaction that reads first and then writes can be refused at once.
    """
    path = sqlite_path(url)
    if path is None:
        return create_engine(url, connect_args=POSTGRESQL_ARGUMENTS, pool_pre_ping=True)
    name = f"file:{quote(str(path.absolute()))}?mode={'rwc' if create else 'rw'}"

    def connect() -> sqlite3.Connection:
        # isolation_level None: the driver begins no transactions of its own.
        return sqlite3.connect(name, uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False)

    engine = create_engine("sqlite://", creator=connect, poolclass=_queue_pool())
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _queue_pool() -> Any:
    from sqlalchemy.pool import QueuePool  # without a file name SQLAlchemy would take the pool for memory

    return QueuePool


def _prepare_sqlite(connection: sqlite3.Connection, _: Any) -> None:
    connection.execute("PRAGMA auto_vacuum=INCREMENTAL")  # has an effect on a new file only
    _use_wal(connection)
    connection.execute("PRAGMA synchronous=FULL")  # in WAL mode: one fsync a commit, before it returns
    connection.execute("PRAGMA secure_delete=ON")  # what prune deletes is overwritten too
    connection.execute("PRAGMA journal_size_limit=67108864")  # bytes of a log kept after it was used


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch to the write-ahead log; SQLite does not wait for a lock here, so it is asked again."""
    until = time.monotonic() + BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def file_ids(url: URL) -> FileIds:
    """Return which files stand at SQLite's paths now; nothing for another database.

    SQLite goes on writing to a file that was deleted, and calls that committed.
    """
    return (_file_id(f"{url.database}"), _file_id(f"{url.database}-wal")) if url.drivername in SQLITE else ()


def _file_id(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def is_store_failure(error: Exception) -> bool:
    """Return whether the database failed, and not one row: gone, full, locked, corrupt, read-only."""
    if not isinstance(error, DBAPIError):
        return isinstance(error, OSError | sqlite3.OperationalError)
    if error.connection_invalidated or isinstance(error, OperationalError | InternalError):
        return True
    if isinstance(error, ProgrammingError):
        # SQLSTATE class 42: no such table, no permission. Without a state the driver refused a value.
        return str(getattr(error.orig, "sqlstate", None) or "").startswith("42")
    # The class itself: SQLite's "malformed" and "not a database".
    return type(error) is DatabaseError


def reason_of(error: Exception) -> str:
    """Return the first line of what the database said."""
    said = str(error.orig if isinstance(error, DBAPIError) and error.orig else error)
    return next((line for line in said.splitlines() if line.strip()), type(error).__name__)
