"""The way to MLflow: sqlite beside the checkout, or any server by its URL, asked first whether it is there.

MLflow itself tries for minutes to reach a server or a database that is not there, and then shows a traceback.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from stages.common.errors import InputError
from stages.common.logs import set_quiet_environment

if TYPE_CHECKING:
    from mlflow import MlflowClient

ARTIFACTS = Path(".perennial/mlflow-artifacts")  # of runs whose record is a sqlite file
REACH_TIMEOUT_S = 5.0
REMEDY = "start it (make up), or mend flows.record.tracking_url in params.yaml"
SQLITE = "sqlite:///"
PORTS = {"http": 80, "https": 443, "postgresql": 5432}
# Set before MLflow is imported, unless the user has.
ENVIRONMENT = {
    # A server that answered is asked again a few times, not for the minutes of MLflow's own defaults.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


def tracking_address(root: Path, url: str) -> str:
    """Return the tracking URL with a relative sqlite file taken from the checkout."""
    if not url.startswith(SQLITE):
        return url
    return f"{SQLITE}{(root / url.removeprefix(SQLITE)).resolve()}"


def open_tracking(root: Path, url: str) -> MlflowClient:
    """Return a client of experiments and registry; a sqlite file is made if there is none.

    Takes some seconds the first time in a process (MLflow's import), and some more where it makes the file.

    Raises:
        InputError: nothing answers there, or what lies there is no database, within about 5 s.
    """
    return _client(tracking_address(root, url))


@lru_cache(maxsize=4)
def _client(address: str) -> MlflowClient:
    set_quiet_environment()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if address.startswith(SQLITE):
        _check_sqlite(Path(address.removeprefix(SQLITE)))
    else:
        _check_answers(address)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # else: a line for every migration
    from mlflow import MlflowClient

    with tracking_errors(address), _alone(address):
        client = MlflowClient(tracking_uri=address, registry_uri=address)
        client.search_registered_models(max_results=1)  # opens the database, and makes its tables
    return client


def without_password(address: str) -> str:
    """Return a URL as it may be shown."""
    return re.sub(r"//[^@/]*@", "//…@", address)


@contextmanager
def tracking_errors(address: str) -> Iterator[None]:
    """Turn what MLflow raises of a store that fails into an error that names it."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise InputError(f"MLflow at {without_password(address)} failed: {error}", REMEDY) from error


@contextmanager
def _alone(address: str) -> Iterator[None]:
    """Let one process at a time make the tables of a sqlite file: two at once leave half of them."""
    if not address.startswith(SQLITE):
        yield
        return
    with Path(address.removeprefix(SQLITE)).with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_sqlite(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=REACH_TIMEOUT_S)) as connection:
            connection.execute("PRAGMA user_version").fetchone()
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except (sqlite3.Error, OSError) as error:
        raise InputError(
            f"{path} cannot be opened as MLflow's database: {error}",
            "move it away, or mend flows.record.tracking_url in params.yaml",
        ) from None


def _check_answers(address: str) -> None:
    parts = urlsplit(address)
    port = parts.port or PORTS.get(parts.scheme.split("+")[0], 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=REACH_TIMEOUT_S).close()
    except OSError as error:
        raise InputError(f"nothing answers at {without_password(address)}: {error}", REMEDY) from None
