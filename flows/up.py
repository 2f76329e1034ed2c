"""The Prefect server with its page, and the process that executes scheduled runs: `python -m flows.up`.

Both end with this one, on Ctrl-C, SIGTERM or its death. PREFECT_SERVER_API_HOST and
PREFECT_SERVER_API_PORT say where the server listens; the schedule is `flows.training` in params.yaml.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from flows import console, deployments, leftovers, server
from flows.run_lock import FOLDER
from stages.common.errors import InputError
from stages.common.params import TrainingFlow, load_params

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", "4200"
POLL_S = 0.5
STOP_PATIENCE_S = 20.0  # the executor ends a run at work, and the run its stages

logger = logging.getLogger("flows.up")


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the server and what executes the schedule; return the exit code."""
    argparse.ArgumentParser(prog="python -m flows.up", description=__doc__).parse_args(arguments)
    console.set_up()
    root = Path.cwd()
    try:
        return up(root, load_params(root / "params.yaml").flows.training)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 0


def up(root: Path, settings: TrainingFlow) -> int:
    """Run the server and the process that executes what is due, until a signal; then end both."""
    host = os.environ.get("PREFECT_SERVER_API_HOST", DEFAULT_HOST)
    port = int(os.environ.get("PREFECT_SERVER_API_PORT", DEFAULT_PORT))
    url = f"http://{DEFAULT_HOST if host == '0.0.0.0' else host}:{port}/api"
    if server.is_up(url):
        other_port = f"PREFECT_SERVER_API_PORT={port + 1}"
        remedy = f"use it (python -m flows.deployments --execute), or take another port: {other_port}"
        raise InputError(f"a Prefect server already answers at {url}", remedy)
    os.environ[leftovers.RUN_ID_VARIABLE] = uuid.uuid4().hex
    with ExitStack() as stack:
        stack.enter_context(_signals_interrupt())
        stack.enter_context(leftovers.watchdog(os.environ[leftovers.RUN_ID_VARIABLE]))
        api = server.start(host, port, root / FOLDER / "server.log")
        stack.callback(server.stop, api)
        server.wait_until_up(url, api)
        server.announce(root, url)
        stack.callback((root / FOLDER / "server.json").unlink, missing_ok=True)
        executor = _start_executor(url)
        stack.callback(server.stop, executor, signal.SIGINT, STOP_PATIENCE_S)
        logger.info("Prefect's page is at http://%s:%d; Ctrl-C ends it", host, port)
        logger.info("training: %s", deployments.describe(settings))
        return _watch({"the Prefect server": api, "the process that executes what is due": executor})


def _start_executor(url: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "flows.deployments", "--execute"],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PREFECT_API_URL": url},
        start_new_session=True,
    )


def _watch(processes: dict[str, subprocess.Popen[bytes]]) -> int:
    while True:
        for name, process in processes.items():
            if process.poll() is not None:
                logger.error("%s ended with exit code %d; ending the rest", name, process.returncode)
                return 1
        time.sleep(POLL_S)


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Take SIGTERM as Ctrl-C, and Ctrl-C even where a shell has started this in its background."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
