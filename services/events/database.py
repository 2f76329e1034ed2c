"""The event store's database: URLs, and connections with durable commits."""

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
BUSY_S = 5.0  # how long SQLite waits for the write lock of another process
POSTGRESQL_ARGUMENTS = {
    "connect_timeout": 5,  # s
    # Detect a dead connection within seconds instead of hours.
    "keepalives_idle": 10,  # s
    "keepalives_interval": 5,  # s
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,  # ms
    "application_name": "perennial",
    # The server or role may be configured to acknowledge commits before they are on disk.
    "options": "-c synchronous_commit=on",
}

# Device and inode of the open database file and of its log.
FileIds = tuple[tuple[int, int] | None, ...]


def check_url(url: str) -> URL:
    """Return the parsed URL of an event store.

    Raises:
        InputError: it is not a URL, or the kind of database is not supported.
    """
    fix = "write sqlite:///path/to/events.db or postgresql+psycopg://user:password@host/database"
    try:
        parsed = make_url(url)
    except ArgumentError:  # not chained: the URL may contain a password
        raise InputError("the URL of the event store is not valid", fix) from None
    if parsed.drivername not in (*SQLITE, POSTGRESQL):
        raise InputError(f"the URL of the event store has an unsupported scheme, {parsed.drivername!r}", fix)
    if parsed.drivername in SQLITE and (not get_sqlite_path(parsed) or parsed.query):
        raise InputError(
            f"the URL of the event store, {mask_password(parsed)}, has no file, or has options", fix
        )
    return parsed


def mask_password(url: URL) -> str:
    """Return the URL as text, without its password."""
    return url.render_as_string(hide_password=True)


def get_sqlite_path(url: URL) -> Path | None:
    """Return the file of a SQLite URL; None for an in-memory database or another kind of database."""
    if url.drivername not in SQLITE or not url.database or url.database.startswith((":memory:", "file:")):
        return None
    return Path(url.database)


def make_engine(url: URL, create: bool = False) -> Engine:
    """Return an engine whose commits are on disk when they return.

    A transaction on a connection with the execution option `writes` takes SQLite's write lock when it begins;
    one that reads first and then writes could be rejected.

    Args:
        create: create SQLite's file if it is missing. A running store never does: a new, empty file would
            hide the loss of the old one.
    """
    path = get_sqlite_path(url)
    if path is None:
        return create_engine(url, connect_args=POSTGRESQL_ARGUMENTS, pool_pre_ping=True, hide_parameters=True)
    name = f"file:{quote(str(path.absolute()))}?mode={'rwc' if create else 'rw'}"

    def connect() -> sqlite3.Connection:
        # isolation_level None: the driver does not begin transactions by itself.
        return sqlite3.connect(name, uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False)

    engine = create_engine("sqlite://", creator=connect, poolclass=_queue_pool(), hide_parameters=True)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _queue_pool() -> Any:
    from sqlalchemy.pool import QueuePool  # without a file name SQLAlchemy uses the pool for in-memory ones

    return QueuePool


def _prepare_sqlite(connection: sqlite3.Connection, _: Any) -> None:
    connection.text_factory = _decode_text
    connection.execute("PRAGMA auto_vacuum=INCREMENTAL")  # only affects a new file
    _use_wal(connection)
    connection.execute("PRAGMA synchronous=FULL")  # in WAL mode: one fsync per commit, before it returns
    connection.execute("PRAGMA secure_delete=ON")  # overwrite deleted content
    connection.execute(
        "PRAGMA journal_size_limit=67108864"
    )  # bytes of the log that are kept after a checkpoint


def _decode_text(data: bytes) -> str:
    """Return a stored text; SQLite does not check its bytes, and a damaged one must not end all reading."""
    return data.decode("utf-8", "replace")


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch to the write-ahead log; retried, because SQLite does not wait for locks here."""
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


def get_file_ids(url: URL) -> FileIds:
    """Return the identity of the files at SQLite's paths; empty for another database.

    SQLite keeps writing to a file that was deleted, and reports success.
    """
    return (_file_id(f"{url.database}"), _file_id(f"{url.database}-wal")) if url.drivername in SQLITE else ()


def _file_id(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def is_store_failure(error: Exception) -> bool:
    """Return whether the database failed (gone, full, locked, corrupt, read-only), not just one row."""
    if not isinstance(error, DBAPIError):
        return isinstance(error, OSError | sqlite3.OperationalError)
    if error.connection_invalidated or isinstance(error, OperationalError | InternalError):
        return True
    if isinstance(error, ProgrammingError):
        # SQLSTATE class 42: no such table, no permission. Without a state, the driver rejected a value.
        return str(getattr(error.orig, "sqlstate", None) or "").startswith("42")
    # DatabaseError itself is SQLite's "malformed" and "not a database".
    return type(error) is DatabaseError


def describe_error(error: Exception) -> str:
    """Return the first line of a database's error message."""
    message = str(error.orig if isinstance(error, DBAPIError) and error.orig else error)
    return next((line for line in message.splitlines() if line.strip()), type(error).__name__)
