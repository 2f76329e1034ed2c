"""The Prefect API that a run reports to: the user's own, the one of `make up`, or one for this run.

With none at work Prefect would start a temporary server inside the first flow and import the whole
server in the flow's own process. Starting it here, first of all and beside the rest, saves those
seconds, and keeps it away from the terminal's Ctrl-C, so that a stopped run can still say so.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from flows.common import processes
from stages.common.artifacts import STATE, write_json
from stages.common.errors import InputError

DEFAULT_URL = "http://127.0.0.1:4200/api"
STARTUP_TIMEOUT_S = 90.0  # creating Prefect's database on a slow machine
POLL_S = 0.1
FLUSH_S = 5.0

logger = logging.getLogger("flows.common.prefect_api")


def configured_url() -> str | None:
    """Return the API of the user's environment or Prefect profile, read without importing Prefect."""
    if url := os.environ.get("PREFECT_API_URL"):
        return url
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    path = Path(os.environ.get("PREFECT_PROFILES_PATH", home / "profiles.toml")).expanduser()
    try:
        profiles = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    active = os.environ.get("PREFECT_PROFILE", profiles.get("active"))
    url = profiles.get("profiles", {}).get(active, {}).get("PREFECT_API_URL")
    return str(url) if url else None


def is_up(url: str) -> bool:
    """Tell whether a Prefect API answers at `url`."""
    parts = urlsplit(url)
    try:
        connection = http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port or 80, timeout=2)
        connection.request("GET", f"{parts.path}/health")
        answer = connection.getresponse()
        return answer.status == 200 and answer.read().strip() == b"true"
    except (OSError, http.client.HTTPException):
        return False


def announce(root: Path, url: str) -> None:
    """Tell later runs in this checkout where the server of `make up` answers."""
    write_json(root / STATE / "server.json", {"url": url})


def announced_url(root: Path) -> str | None:
    """Return where `make up` said its server answers; it may be down by now."""
    try:
        return str(json.loads((root / STATE / "server.json").read_text(encoding="utf-8"))["url"])
    except (OSError, ValueError, KeyError):
        return None


@dataclass(frozen=True)
class Api:
    """A Prefect API: there already, or coming up for this run alone."""

    url: str
    process: subprocess.Popen[bytes] | None = None

    @property
    def is_temporary(self) -> bool:
        """Whether the server, and the page it could show, end with the run."""
        return self.process is not None

    def wait(self) -> None:
        """Wait until the API answers; call as late as possible.

        Raises:
            InputError: a temporary server does not come up, or ends at once.
        """
        if self.process is not None:
            wait_until_up(self.url, self.process)


@contextmanager
def reachable(root: Path) -> Iterator[Api]:
    """Set PREFECT_API_URL for the block; start a temporary server if none answers."""
    if url := configured_url():
        yield Api(url)
        return
    for known in (announced_url(root), DEFAULT_URL):
        if known and is_up(known):
            with environment("PREFECT_API_URL", known):
                yield Api(known)
            return
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    run_id = uuid.uuid4().hex
    with processes.watchdog(run_id):  # it has a session of its own: a kill of this process does not end it
        with environment(processes.RUN_ID_VARIABLE, run_id):
            process = start_temporary(port, root / STATE / "server.log")
        try:
            with environment("PREFECT_API_URL", url):
                yield Api(url, process)
        finally:
            stop(process)


def start(host: str, port: int, log: Path) -> subprocess.Popen[bytes]:
    """Start a Prefect server with its page and its services, in a session of its own.

    Its output, a banner that explains what `make up` has done already, goes to `log`.
    """
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", host, "--port", str(port)]
    return _start_logged(command, {}, log)


def start_temporary(port: int, log: Path) -> subprocess.Popen[bytes]:
    """Start a server for one run as Prefect itself would: no page, and only the services that record runs."""
    import_path = str(Path(find_spec("prefect").origin).parents[1])  # type: ignore[union-attr,arg-type]
    command = [sys.executable, "-m", "uvicorn", "--app-dir", import_path, "--factory"]
    command += ["prefect.server.api.server:create_app", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--log-level", "error", "--lifespan", "on"]
    environment = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    return _start_logged(command, environment, log)


def _start_logged(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )


def wait_until_up(url: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until the server answers.

    Raises:
        InputError: it ended, or did not answer in time.
    """
    timeout_s = float(os.environ.get("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", STARTUP_TIMEOUT_S))
    deadline = time.monotonic() + timeout_s
    while not is_up(url):
        if process.poll() is not None:
            raise InputError(
                f"the Prefect server ended at once with exit code {process.returncode}",
                f"see {STATE / 'server.log'}; or run without Prefect: dvc repro",
            )
        if time.monotonic() > deadline:
            raise InputError(
                f"the Prefect server did not answer at {url} within {timeout_s:.0f} s",
                "set PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS higher, or run dvc repro",
            )
        time.sleep(POLL_S)


def stop(
    process: subprocess.Popen[bytes], number: signal.Signals = signal.SIGTERM, patience_s: float = 5.0
) -> None:
    """Ask a process to end, and kill what is left of it and of what it started after a while."""
    process.send_signal(number)
    try:
        process.wait(timeout=patience_s)
    except subprocess.TimeoutExpired:
        logger.warning("process %d did not end in %.0f s; killing it", process.pid, patience_s)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def flush() -> None:
    """Send the log lines and task-run events that Prefect has queued."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    APILogWorker.drain_all(timeout=FLUSH_S)
    EventsWorker.drain_all(timeout=FLUSH_S)


def literal_name(name: str) -> Callable[[], str]:
    """Return `name` as Prefect's flow_run_name and task_run_name take it unchanged.

    They format a plain string as a template, so braces in it (a changed list in params.yaml) would raise.
    """
    return lambda: name


def free_port() -> int:
    """Return a TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for the block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
