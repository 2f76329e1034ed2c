"""A service of one's own for the gate: candidate and champion side by side, asked by nobody else.

It is the service that users meet (`bentoml serve services.generation:Generation`), from the same code, in
a folder of its own below `.perennial/`: there it finds its own alias file, event store, keys and a copy of
the parameters. So the aliases that production follows do not move, no question of the gate is counted as
traffic, and limits meant for users do not slow the gate down.
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
from pathlib import Path
from typing import Any

import psutil

from flows.common import processes
from services.versions import __main__ as versions
from services.versions.__main__ import ALIASES, Aliases, Challenger
from stages.common import network
from stages.common.artifacts import STATE, read_json, write_json, write_text
from stages.common.errors import InputError
from stages.common.logs import QUIET_ENVIRONMENT
from stages.common.params.loading import Params

PREFIX = "gate-service-"  # of the folder of each, below .perennial
OWNER = "owner.json"
LOG = STATE / "logs" / "gate-service.log"
CODE = Path(versions.__file__).resolve().parents[2]  # where `services` and `stages` are imported from
START_WITHIN_S = 600.0  # two versions are read into memory, on a machine that may be busy
POLL_S = 0.2
SAY_EVERY_S = 10.0
STOP_PATIENCE_S = 15.0
SAME_START_S = 1.0  # two processes of one number that began further apart are two
LAST_LINES = 15  # of its log, in the error of a service that does not start
MAX_MESSAGES = 1000  # of a conversation: rows of a test are not refused for their length

logger = logging.getLogger("flows.gate.private_server")


@dataclass(frozen=True, slots=True)
class PrivateService:
    """A service at work.

    Attributes:
        url: where it answers, on loopback.
        candidate, champion: the tags it answers to; champion is None where there is none to compare with.
        pid: of BentoML's parent process.
    """

    url: str
    candidate: str
    champion: str | None
    pid: int


@contextmanager
def serving(root: Path, params: Params, candidate: str, champion: str | None) -> Iterator[PrivateService]:
    """Serve both versions until the block ends; each is asked for by its tag.

    What an earlier one left behind, because everything was killed, is ended first.

    Raises:
        InputError: it ends at once, or is not ready in time; the end of its log is in the error.
    """
    end_leftovers(root)
    run_id = uuid.uuid4().hex
    folder = make_folder(root, params, candidate, champion, run_id)
    port = network.free_port()
    with processes.watchdog(run_id):
        process = _start(folder, root / LOG, run_id, port)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url, process, root / LOG)
            yield PrivateService(url, candidate, champion, process.pid)
        finally:
            _stop(process, run_id)
            shutil.rmtree(folder, ignore_errors=True)


def make_folder(root: Path, params: Params, candidate: str, champion: str | None, run_id: str) -> Path:
    """Write what the service finds in its working folder, and return the folder."""
    (root / STATE).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root / STATE)).resolve()
    # First of all: a folder without an owner is one whose making was killed.
    write_json(folder / OWNER, {"run_id": run_id, **_identity(psutil.Process())})
    trial = Challenger(champion, 0.0, "canary") if champion else None
    versions.take_over(Aliases(candidate, trial, managed=True), folder / ALIASES)
    write_text(folder / "params.yaml", private_params(params, folder))
    return folder


def private_params(params: Params, folder: Path) -> str:
    """Return the text of params.yaml for the private service: its own files, and no limits of users.

    The guard records and refuses nothing: its verdicts on answers are the gate's to count.
    """
    import yaml

    values = params.model_dump(mode="json", by_alias=True)
    services = values["services"]
    services["versions"] |= {"follow_pipeline": False, "keep_loaded": 2}
    services["access"] |= {
        "keys": "auto",
        "keys_file": str(folder / "keys.json"),
        "requests_per_minute": None,
        "tokens_per_day": None,
    }
    services["events"] |= {"url": events_url(folder), "retention_days": None}
    guard = services["guard"]
    guard |= {key: "record" for key, value in guard.items() if value == "enforce"}
    guard |= {
        "max_messages": max(MAX_MESSAGES, guard["max_messages"]),
        "max_prompt_tokens": max(services["engine"]["context_tokens"], guard["max_prompt_tokens"]),
    }
    # YAML and not JSON: YAML reads JSON's 1e-05 as a word.
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def events_url(folder: Path) -> str:
    """Return the URL of the event store in the private service's folder."""
    return f"sqlite:///{folder / 'events.db'}"


def end_leftovers(root: Path) -> int:
    """End private services whose owners were killed, and remove their folders; return how many there were."""
    ended = 0
    for folder in sorted((root / STATE).glob(f"{PREFIX}*")):
        try:
            owner: dict[str, Any] = read_json(folder / OWNER)
        except InputError:
            # A folder that is just being made has no owner yet; it is left for the next time.
            if time.time() - folder.stat().st_mtime > START_WITHIN_S:
                shutil.rmtree(folder, ignore_errors=True)
            continue
        if _lives(owner):
            continue
        if processes.terminate_orphans(owner["run_id"]):
            logger.warning("ended a service that a killed gate (pid %d) left behind", owner["pid"])
        shutil.rmtree(folder, ignore_errors=True)
        ended += 1
    return ended


def _identity(process: psutil.Process) -> dict[str, Any]:
    # The number alone would not do: numbers of processes are used again.
    return {"pid": process.pid, "created": process.create_time()}


def _lives(owner: dict[str, Any]) -> bool:
    try:
        return bool(abs(psutil.Process(owner["pid"]).create_time() - owner["created"]) < SAME_START_S)
    except psutil.Error:
        return False


def _start(folder: Path, log: Path, run_id: str, port: int) -> subprocess.Popen[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "bentoml", "serve", "services.generation:Generation"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    path = os.pathsep.join(filter(None, [str(CODE), os.environ.get("PYTHONPATH")]))
    environment = {
        **QUIET_ENVIRONMENT,
        **os.environ,
        "PYTHONPATH": path,
        # These would take the place of the private parameters.
        "PERENNIAL_EVENTS_URL": events_url(folder),
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
    started = said = time.monotonic()
    logger.info("starting a private service with candidate and champion at %s …", url)
    while not network.is_up(f"{url}/readyz"):
        now = time.monotonic()
        if process.poll() is not None:
            raise InputError(
                f"the private service ended with exit code {process.returncode}\n{_last_lines(log)}",
                f"mend what its log says ({LOG}), and judge again",
            )
        if now - started > START_WITHIN_S:
            raise InputError(
                f"the private service is not ready after {START_WITHIN_S:.0f} s\n{_last_lines(log)}",
                f"see {LOG}; free memory or processors, and judge again",
            )
        if now - said > SAY_EVERY_S:
            said = now
            logger.info("still loading, for %.0f s", now - started)
        time.sleep(POLL_S)
    logger.info("the private service is ready after %.0f s", time.monotonic() - started)


def _last_lines(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return "\n".join(f"  {line}" for line in lines[-LAST_LINES:])


def _stop(process: subprocess.Popen[bytes], run_id: str) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_PATIENCE_S)
    # Its workers carry the same id; and a parent that did not end is asked again, and then made to.
    processes.terminate_orphans(run_id)
    process.wait()
