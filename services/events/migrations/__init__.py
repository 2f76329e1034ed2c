"""The event store's schema, version by version; brought up to date as the store is opened."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Engine, text

from stages.common.errors import InputError

if TYPE_CHECKING:
    from alembic.config import Config

FOLDER = Path(__file__).parent
ADVISORY_LOCK = 7235419806  # any number that is this store's alone in a PostgreSQL database
_one_at_a_time = threading.Lock()  # Alembic keeps its context in a global


def migrate(engine: Engine, name: str) -> bool:
    """Bring the database up to this code's version; return whether anything was changed.

    Processes that open a store together wait for each other: the second finds nothing to do. All
    steps are one transaction.

    Args:
        name: of the store, for the error.

    Raises:
        InputError: the database is newer than the code, or cannot hold every text.
    """
    from alembic import command

    with engine.connect() as connection:
        _check_encoding(connection, name)
        if problem(connection, name) is None:
            return False
    with _one_at_a_time, engine.execution_options(writes=True).begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})
        if problem(connection, name) is None:
            return False
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    return True


def _check_encoding(connection: Connection, name: str) -> None:
    if connection.dialect.name != "postgresql":
        return
    encoding = connection.execute(text("SHOW server_encoding")).scalar()
    if encoding != "UTF8":
        raise InputError(
            f"the event store {name} has the encoding {encoding}, which cannot hold every text",
            "make it with CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0",
        )


def problem(connection: Connection, name: str) -> str | None:
    """Return None if the database has this code's version, else that it is older.

    Raises:
        InputError: it is newer.
    """
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    script = ScriptDirectory.from_config(_config())
    found = MigrationContext.configure(connection).get_current_revision()
    if found == script.get_current_head():
        return None
    if found is not None and found not in {step.revision for step in script.walk_revisions()}:
        raise InputError(
            f"the event store {name} has version {found}, which is newer than this code "
            f"(it knows up to {script.get_current_head()})",
            "install the newer Perennial again, or give another services.events.url",
        )
    return f"the event store {name} has version {found}, this code wants {script.get_current_head()}"


def _config() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config
