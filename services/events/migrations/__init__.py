"""Migrations of the event store's schema, applied when the store is opened."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Engine, text

from stages.common.errors import InputError

if TYPE_CHECKING:
    from alembic.config import Config

FOLDER = Path(__file__).parent
ADVISORY_LOCK = 7235419806  # an arbitrary number, unique to this store in a PostgreSQL database
_alembic_lock = threading.Lock()  # Alembic keeps its context in a global


def migrate(engine: Engine, name: str) -> bool:
    """Upgrade the database to the current schema version; return whether anything changed.

    Concurrent processes wait for each other. All steps run in one transaction.

    Args:
        name: of the store, for error messages.

    Raises:
        InputError: the database is newer than the code, or its encoding is not UTF-8.
    """
    from alembic import command

    with engine.connect() as connection:
        _check_encoding(connection, name)
        if find_version_problem(connection, name) is None:
            return False
    with _alembic_lock, engine.execution_options(writes=True).begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})
        if find_version_problem(connection, name) is None:
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
            f"the event store {name} has the encoding {encoding}, which cannot store every text",
            "create it with CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0",
        )


def find_version_problem(connection: Connection, name: str) -> str | None:
    """Return None if the database has the current schema version, or a message if it is older.

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
            f"(which supports up to {script.get_current_head()})",
            "install the newer Perennial again, or set another services.events.url",
        )
    return f"the event store {name} has version {found}, and this code needs {script.get_current_head()}"


def _config() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config
