"""A private server for the gate, with candidate and champion side by side.

It runs the production service (`bentoml serve services.generation:Generation`) in a folder of its own below
`.perennial/`, with its own alias file, event store, keys and copy of the parameters. So production's aliases
do not move, the gate's requests are not counted as traffic, and user limits do not slow the gate down.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import services
from flows.common import processes
from services.versions.aliases import ALIASES, Aliases, Challenger, write_aliases
from stages.common import network
from stages.common.artifacts import STATE, make_folder, read_json, write_json, write_text
from stages.common.errors import InputError
from stages.common.locks import hold_lock, try_file_lock
from stages.common.logs import QUIET_ENVIRONMENT
from stages.common.params.loading import Params

PREFIX = "gate-service-"  # of each server's folder below .perennial
OWNER = "owner.json"
LOCK = "owner.lock"
LOG = STATE / "logs" / "gate-service.log"
CODE = Path(services.__file__).resolve().parents[1]  # the folder that holds `services` and `stages`
START_WITHIN_S = 600.0  # to load two versions on a busy machine
POLL_S = 0.2
LOG_EVERY_S = 10.0
STOP_PATIENCE_S = 15.0
LAST_LINES = 15  # of the log, in the error when the server does not start
MAX_MESSAGES = 1000  # of a conversation, so that no test row is rejected for its length

logger = logging.getLogger("flows.gate.private_server")


@dataclass(frozen=True, slots=True)
class PrivateServer:
    """A running private server.

    Attributes:
        url: on loopback.
        candidate, champion: tags of the loaded versions; champion is None if there is none.
        pid: of BentoML's parent process.
    """

    url: str
    candidate: str
    champion: str | None
    pid: int


@contextmanager
def serve(root: Path, params: Params, candidate: str, champion: str | None) -> Iterator[PrivateServer]:
    """Serve both versions until the block ends; a request names the version by its tag.

    Servers that a killed gate left running are ended first.

    Raises:
        InputError: it does not start, or is not ready in time; the error has the end of its log.
    """
    end_orphans(root)
    run_id = uuid.uuid4().hex
    port = network.free_port()
    with own_folder(root, params, candidate, champion, run_id) as folder, processes.run_watchdog(run_id):
        process = _start(folder, root / LOG, run_id, port)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url, process, root / LOG)
            yield PrivateServer(url, candidate, champion, process.pid)
        finally:
            _stop(process, run_id)


@contextmanager
def own_folder(
    root: Path, params: Params, candidate: str, champion: str | None, run_id: str
) -> Iterator[Path]:
    """Create the server's working folder with its alias file and parameters; remove it after the block.

    It is locked as long as its owner lives: the kernel knows, whatever happens to clocks and process numbers.
    """
    make_folder(root / STATE)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root / STATE)).resolve()
    with hold_lock(folder / LOCK):
        try:
            # Written first: a folder without an owner is one whose creation was killed.
            write_json(folder / OWNER, {"run_id": run_id, "pid": os.getpid()})
            other = Challenger(champion, 0.0, "canary") if champion else None
            write_aliases(folder / ALIASES, Aliases(candidate, other))
            write_text(folder / "params.yaml", format_private_params(params, folder))
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def format_private_params(params: Params, folder: Path) -> str:
    """Return the text of params.yaml for the private server: its own files, and no user limits.

    The guard records its verdicts and blocks nothing: the gate counts flagged answers itself.
    """
    import yaml

    values = params.model_dump(mode="json", by_alias=True)
    section = values["services"]
    section["versions"] |= {"follow_pipeline": False, "keep_loaded": 2}
    section["access"] |= {
        "keys": "auto",
        "keys_file": str(folder / "keys.json"),
        "requests_per_minute": None,
        "tokens_per_day": None,
    }
    if section["engine"]["kind"] == "vllm" and find_spec("vllm") is None:
        # vLLM has an environment of its own. Here an engine of the training's environment asks both versions.
        section["engine"]["kind"] = "auto"
    section["events"] |= {"url": get_events_url(folder), "retention_days": None}
    guard = section["guard"]
    guard |= {key: "record" for key, value in guard.items() if value == "enforce"}
    guard |= {
        "max_messages": max(MAX_MESSAGES, guard["max_messages"]),
        "max_prompt_tokens": max(section["engine"]["context_tokens"], guard["max_prompt_tokens"]),
    }
    # YAML and not JSON: YAML reads JSON's 1e-05 as a string.
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def get_events_url(folder: Path) -> str:
    """Return the URL of the event store in the server's folder."""
    return f"sqlite:///{folder / 'events.db'}"


def end_orphans(root: Path) -> int:
    """End private servers whose owner was killed, and remove their folders; return their number."""
    ended = 0
    for folder in sorted((root / STATE).glob(f"{PREFIX}*")):
        try:
            owner: dict[str, Any] = read_json(folder / OWNER)
        except InputError:
            # A folder that is being created has no owner yet; it is left alone.
            # By the clock alone: there is no lock yet. One that was set takes an empty folder at most.
            if time.time() - folder.stat().st_mtime > START_WITHIN_S:
                shutil.rmtree(folder, ignore_errors=True)
            continue
        with try_file_lock(folder / LOCK) as is_free:
            if not is_free:
                continue
        if processes.terminate_orphans(owner["run_id"]):
            logger.warning("ended a private server that a killed gate (pid %d) left running", owner["pid"])
        shutil.rmtree(folder, ignore_errors=True)
        ended += 1
    return ended


def _start(folder: Path, log: Path, run_id: str, port: int) -> subprocess.Popen[bytes]:
    make_folder(log.parent)
    command = [sys.executable, "-m", "bentoml", "serve", "services.generation:Generation"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    path = os.pathsep.join(filter(None, [str(CODE), os.environ.get("PYTHONPATH")]))
    environment = {
        **QUIET_ENVIRONMENT,
        **os.environ,
        "PYTHONPATH": path,
        # These override params.yaml.
        "PERENNIAL_EVENTS_URL": get_events_url(folder),
        "PERENNIAL_KEYS_FILE": str(folder / "keys.json"),
        processes.RUN_ID_VARIABLE: run_id,
    }
    with log.open("wb") as file:
        return subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    started = logged = time.monotonic()
    logger.info("starting a private server with candidate and champion at %s …", url)
    while not network.is_up(f"{url}/readyz"):
        now = time.monotonic()
        if process.poll() is not None:
            raise InputError(
                f"the private server ended with exit code {process.returncode}\n{_last_lines(log)}",
                f"fix the error in its log ({LOG}) and judge again",
            )
        if now - started > START_WITHIN_S:
            raise InputError(
                f"the private server is not ready after {START_WITHIN_S:.0f} s\n{_last_lines(log)}",
                f"see {LOG}; free memory or processors, and judge again",
            )
        if now - logged > LOG_EVERY_S:
            logged = now
            logger.info("still loading after %.0f s", now - started)
        time.sleep(POLL_S)
    logger.info("the private server is ready after %.0f s", time.monotonic() - started)


def _last_lines(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return "\n".join(f"  {line}" for line in lines[-LAST_LINES:])


def _stop(process: subprocess.Popen[bytes], run_id: str) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_PATIENCE_S)
    # Ends its workers too, which have the same run id, and a parent that ignored SIGTERM.
    processes.terminate_orphans(run_id)
    process.wait()
