"""Connect to MLflow: a sqlite file in the checkout, or any server by its URL.

Whether it answers is checked first: MLflow itself retries for minutes to reach a server or a database that is
down, and then shows a traceback.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from stages.common import network
from stages.common.artifacts import STATE, atomic_write, make_folder
from stages.common.errors import InputError
from stages.common.locks import hold_lock
from stages.common.logs import set_quiet_environment
from stages.common.params.loading import Params

if TYPE_CHECKING:
    from mlflow import MlflowClient

ARTIFACTS = STATE / "mlflow-artifacts"  # of runs whose record is a sqlite file
REACH_TIMEOUT_S = 5.0
FIX = "start it (make up), or fix flows.tracking.tracking_url in params.yaml"
SQLITE = "sqlite:///"
POSTGRESQL_PORT = 5432
# Set before MLflow is imported, unless the user has.
ENVIRONMENT = {
    # A server that answered is asked again a few times, not for the minutes of MLflow's own defaults.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


@dataclass(frozen=True, slots=True)
class Registry:
    """Where the runs and versions of a checkout's model are recorded.

    Attributes:
        root: the checkout.
        model: the model's name; a version's tag is `model:VERSION`.
        tracking_url: of MLflow; a sqlite file's path is relative to the checkout.
        experiment: MLflow's experiment for the runs.
    """

    root: Path
    model: str
    tracking_url: str
    experiment: str

    @classmethod
    def of(cls, root: Path, params: Params) -> Registry:
        """Return the registry that params.yaml names."""
        tracking = params.flows.tracking
        return cls(root, params.model_card.name, tracking.tracking_url, tracking.experiment)

    @property
    def address(self) -> str:
        """The tracking URL with an absolute path."""
        return resolve_address(self.root, self.tracking_url)


def resolve_address(root: Path, url: str) -> str:
    """Return the tracking URL with a relative sqlite file taken from the checkout."""
    if not url.startswith(SQLITE):
        return url
    return f"{SQLITE}{(root / url.removeprefix(SQLITE)).resolve()}"


def open_tracking(root: Path, url: str) -> MlflowClient:
    """Return a client of experiments and registry; a sqlite file is created if there is none.

    Takes some seconds the first time in a process (MLflow's import), and some more where it makes the file.

    Raises:
        InputError: nothing answers within about 5 s, or the file is not a database; or MLflow is
            not installed.
    """
    if find_spec("mlflow") is None:
        raise InputError("MLflow is not installed", "pip install '.[monitor]'")
    address = resolve_address(root, url)
    set_quiet_environment()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _check(address)
    return _client(address)


@lru_cache(maxsize=4)
def _client(address: str) -> MlflowClient:
    logging.getLogger("alembic").setLevel(logging.WARNING)  # else: a line for every migration
    with convert_errors(address):
        if address.startswith(SQLITE):
            _make_tables(Path(address.removeprefix(SQLITE)))
        return _connect(address)


def _make_tables(path: Path) -> None:
    """Make the tables of a sqlite file that is empty; two processes at once, or a kill, would leave half."""
    with hold_lock(path.with_suffix(".lock")):
        if path.stat().st_size == 0:
            with atomic_write(path) as temporary:
                _connect(f"{SQLITE}{temporary}")


def _connect(address: str) -> MlflowClient:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=address, registry_uri=address)
    client.search_registered_models(max_results=1)  # opens the database, and makes or checks its tables
    return client


def mask_password(address: str) -> str:
    """Return a URL without its password."""
    return re.sub(r"//[^@/\s]*@", "//…@", address)


@contextmanager
def convert_errors(address: str) -> Iterator[None]:
    """Convert errors of MLflow and of its store into an InputError that names the address."""
    from alembic.util import CommandError
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, CommandError, SQLAlchemyError, RequestException) as error:
        raise InputError(f"MLflow at {mask_password(address)} failed: {error}", FIX) from error


def _check(address: str) -> None:
    """Check that the server or the file answers: MLflow's own attempts take minutes.

    Every call checks again, since a process may run for days while servers stop and start.
    """
    if address.startswith(SQLITE):
        _open_file(Path(address.removeprefix(SQLITE)))
        return
    try:
        if address.startswith("http"):
            if not network.is_up(f"{address.rstrip('/')}/health", REACH_TIMEOUT_S):
                raise ConnectionError("no answer")
        else:
            parts = urlsplit(address)
            host, port = parts.hostname or "localhost", parts.port or POSTGRESQL_PORT
            socket.create_connection((host, port), timeout=REACH_TIMEOUT_S).close()
    except OSError as error:
        raise InputError(f"MLflow does not answer at {mask_password(address)}: {error}", FIX) from None


def _open_file(path: Path) -> None:
    try:
        make_folder(path.parent)
        with closing(sqlite3.connect(path, timeout=REACH_TIMEOUT_S)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except (sqlite3.Error, OSError) as error:
        raise InputError(
            f"{path} cannot be opened as MLflow's database: {error}",
            "move the file away, or fix flows.tracking.tracking_url in params.yaml",
        ) from None
