"""The Prefect API that a run reports to: the user's own, the one of `make up`, or a temporary one.

Without a running server Prefect would start a temporary one inside the first flow and import the whole
server in the flow's own process. Starting it here, first and in parallel, saves those seconds and shields
it from the terminal's Ctrl-C, so that a stopped run can still report its end.
"""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flows.common import guarded_pages, processes
from flows.common.page_secret import encode_auth_string, make_auth_string, make_secret
from stages.common import network
from stages.common.artifacts import STATE, write_private_json
from stages.common.errors import InputError

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

DEFAULT_URL = "http://127.0.0.1:4200/api"
STARTUP_TIMEOUT_S = 90.0  # creating Prefect's database on a slow machine
TIMEOUT_VARIABLE = "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"
FLUSH_S = 5.0

Result = TypeVar("Result")


def read_configured_url() -> str | None:
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
    """Return whether a Prefect API answers at `url`; any other server does not count."""
    answer = network.get(f"{url}/health")
    return answer is not None and answer[0] == 200 and answer[1].strip() == b"true"


def lets_in(root: Path, url: str) -> bool:
    """Return whether a Prefect API answers at `url`, and takes the secret that this checkout has for it.

    It may be the one of another checkout's `make up`, which has a secret of its own.
    """
    auth_string = read_auth_string(root, url)
    headers = {"Authorization": encode_auth_string(auth_string)} if auth_string else {}
    answer = network.get(f"{url}/admin/version", headers=headers) if is_up(url) else None
    return answer is not None and answer[0] == 200


def announce(root: Path, url: str, auth_string: str | None = None) -> None:
    """Record the API of `make up` and its secret, for later runs in this checkout, readable by its owner.

    Args:
        auth_string: `user:password`, as PREFECT_API_AUTH_STRING has it; None if the API needs none.
    """
    write_private_json(root / STATE / "server.json", {"url": url, "auth_string": auth_string})


def read_announced_url(root: Path) -> str | None:
    """Return the API that `make up` recorded; it may be down by now."""
    url = _read_announced(root).get("url")
    return str(url) if url else None


def read_auth_string(root: Path, url: str) -> str | None:
    """Return the `user:password` of an API: of `make up`, if it is that one, else the environment's."""
    announced = _read_announced(root)
    if announced.get("auth_string") and str(announced.get("url")).rstrip("/") == url.rstrip("/"):
        return str(announced["auth_string"])
    return os.environ.get("PREFECT_API_AUTH_STRING")


@contextmanager
def set_api(root: Path, url: str) -> Iterator[None]:
    """Let Prefect's clients use an API, with its secret if this checkout knows it, for the block."""
    with ExitStack() as stack:
        stack.enter_context(processes.set_variable("PREFECT_API_URL", url))
        if auth_string := read_auth_string(root, url):
            stack.enter_context(processes.set_variable("PREFECT_API_AUTH_STRING", auth_string))
        yield


def _read_announced(root: Path) -> dict[str, Any]:
    try:
        values = json.loads((root / STATE / "server.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


@dataclass(frozen=True)
class Api:
    """A Prefect API: a running one, or a temporary one that is starting."""

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
def connect(root: Path) -> Iterator[Api]:
    """Set PREFECT_API_URL for the block; start a temporary server if none answers."""
    if url := read_configured_url():
        with set_api(root, url):
            yield Api(url)
        return
    for known in (read_announced_url(root), DEFAULT_URL):
        if known and lets_in(root, known):
            with set_api(root, known):
                yield Api(known)
            return
    port = network.free_port()
    url = f"http://{network.LOOPBACK}:{port}/api"
    run_id, secret = uuid.uuid4().hex, make_secret()
    # The server has a session of its own: a kill of this process does not end it.
    with processes.run_watchdog(run_id):
        with processes.set_variable(processes.RUN_ID_VARIABLE, run_id):
            process = start_temporary(port, root / STATE / "server.log", secret)
        try:
            with (
                processes.set_variable("PREFECT_API_URL", url),
                processes.set_variable("PREFECT_API_AUTH_STRING", make_auth_string(secret)),
            ):
                yield Api(url, process)
        finally:
            processes.stop(process)


def start_temporary(port: int, log: Path, secret: str) -> subprocess.Popen[bytes]:
    """Start a server for one run as Prefect itself would: no page, and only the services that record runs."""
    settings = {
        "PREFECT_UI_ENABLED": "0",
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
        guarded_pages.SECRET: secret,
    }
    log.unlink(missing_ok=True)
    command = guarded_pages.make_command("make_prefect", network.LOOPBACK, port)
    return processes.start(command, log, environment={**os.environ, **settings})


def wait_until_up(url: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until a Prefect server answers.

    Raises:
        InputError: it ended, or did not answer in time.
    """
    timeout_s = float(os.environ.get(TIMEOUT_VARIABLE, STARTUP_TIMEOUT_S))
    if reason := processes.wait_until_up(lambda: is_up(url), process, timeout_s):
        raise InputError(
            f"the Prefect server at {url} {reason}",
            f"see {STATE / 'server.log'}; on a slow machine set {TIMEOUT_VARIABLE} higher; "
            "`dvc repro` runs the stages without Prefect",
        )


def flush() -> None:
    """Send the log lines and task-run events that Prefect has queued."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    APILogWorker.drain_all(timeout=FLUSH_S)
    EventsWorker.drain_all(timeout=FLUSH_S)


def run_flow(root: Path, start: Callable[[], State[Any]]) -> Any:
    """Run a flow against the Prefect API and return its result.

    Args:
        root: the checkout.
        start: imports a flow and runs it with `return_state=True`; importing while the API starts saves time.

    Raises:
        InputError: the flow raised it, was cancelled or crashed, or no API comes up.
    """
    from flows.common import console

    with connect(root) as api:
        import prefect.main  # noqa: F401  makes the terminal's handler, which the filter is added to

        console.hide_reported_errors()
        api.wait()
        if api.is_temporary:
            console.hide_links()
        state = start()
        flush()
    result = state.result(raise_on_failure=False)
    if isinstance(result, BaseException):
        raise result
    if not state.is_completed():
        raise InputError(f"the flow ended {state.name}: {state.message}", "see above; the next run continues")
    return result


def run_as_task(name: str, work: Callable[[], Result]) -> Result:
    """Run `work` as a task of the current flow, shown as `name`.

    It takes no arguments: Prefect inspects them, and fails on a settings section with a key named `keys`.
    """
    from prefect import task
    from prefect.cache_policies import NO_CACHE

    options: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}
    return task(name=name, task_run_name=make_literal_name(name), **options)(work)()


def make_literal_name(name: str) -> Callable[[], str]:
    """Return `name` as Prefect's flow_run_name and task_run_name take it unchanged.

    They format a plain string as a template, so braces in it (a changed list in params.yaml) would raise.
    """
    return lambda: name
