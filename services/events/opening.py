"""Reach the database of a store, and say in words why it cannot be reached."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import URL, Engine
from sqlalchemy.exc import SQLAlchemyError

from services.events.database import check_url, make_engine, reason_of, shown, sqlite_path
from services.events.migrations import migrate, problem
from services.events.schema import StoreUnavailable
from stages.common.errors import InputError


def migrate_store(url: URL) -> bool:
    """Make the store at `url`, or bring its schema up to date; return whether anything changed."""
    path = sqlite_path(url)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    engine = make_engine(url, create=True)
    try:
        return migrate(engine, shown(url))
    finally:
        engine.dispose()


@contextmanager
def opened(url: str) -> Iterator[Engine]:
    """Yield an engine on a store that is there and of this code's version."""
    parsed = check_url(url)
    fix = "start the service, or run perennial events migrate"
    path = sqlite_path(parsed)
    if path is not None and not path.exists():
        raise InputError(f"there is no event store at {path}", fix)
    engine = make_engine(parsed)
    try:
        with reached(parsed, InputError):
            with engine.connect() as connection:
                older = problem(connection, shown(parsed))
            if older:
                raise InputError(older, fix)
            yield engine
    finally:
        engine.dispose()


@contextmanager
def reached(url: URL, unavailable: type[StoreUnavailable] | type[InputError]) -> Iterator[None]:
    """Turn what the database says into an error of ours."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error, OSError) as error:
        text = f"the event store {shown(url)} cannot be used: {reason_of(error)}"
        if unavailable is InputError:
            raise InputError(text, "see that the database runs and its disk has space") from error
        raise StoreUnavailable(text) from error
