"""Open the database of a store; failures become errors with a fix."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import URL, Engine
from sqlalchemy.exc import SQLAlchemyError

from services.events.database import check_url, describe_error, get_sqlite_path, make_engine, mask_password
from services.events.migrations import find_version_problem, migrate
from services.events.schema import StoreUnavailable
from stages.common.artifacts import close_to_others, make_folder
from stages.common.errors import InputError


def migrate_store(url: URL) -> bool:
    """Create the store at `url` or upgrade its schema; return whether anything changed."""
    path = get_sqlite_path(url)
    if path is not None:
        make_folder(path.parent)
        path.touch(mode=0o600)  # SQLite gives the mode to its log too
        close_to_others(path, 0o600)
    engine = make_engine(url, create=True)
    try:
        return migrate(engine, mask_password(url))
    finally:
        engine.dispose()


@contextmanager
def open_database(url: str) -> Iterator[Engine]:
    """Yield an engine for an existing store of the current schema version."""
    parsed = check_url(url)
    fix = "start the service, or run perennial events migrate"
    path = get_sqlite_path(parsed)
    if path is not None and not path.exists():
        raise InputError(f"there is no event store at {path}", fix)
    engine = make_engine(parsed)
    try:
        with translate_errors(parsed, InputError):
            with engine.connect() as connection:
                older = find_version_problem(connection, mask_password(parsed))
            if older:
                raise InputError(older, fix)
            yield engine
    finally:
        engine.dispose()


@contextmanager
def translate_errors(url: URL, unavailable: type[StoreUnavailable] | type[InputError]) -> Iterator[None]:
    """Translate errors of the database into `unavailable`."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error, OSError) as error:
        text = f"the event store {mask_password(url)} cannot be used: {describe_error(error)}"
        if unavailable is InputError:
            raise InputError(text, "check that the database is running and its disk has space") from error
        raise StoreUnavailable(text) from error
