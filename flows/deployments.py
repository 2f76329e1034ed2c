"""The schedule of the training flow, and the Prefect server with its page.

`python -m flows.deployments up` starts the server, registers the deployment and runs what is due,
until Ctrl-C. `python -m flows.deployments register` registers the deployment on a server that runs
already. Both take the schedule from `flows.training` in params.yaml. PREFECT_SERVER_API_HOST and
PREFECT_SERVER_API_PORT move the server.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from flows import console, leftovers, server
from flows.run_lock import FOLDER
from stages.common.errors import InputError
from stages.common.params import TrainingFlow, load_params

if TYPE_CHECKING:
    from uuid import UUID

NAME = "scheduled"
POLL_S = 0.5
STOP_PATIENCE_S = 20.0  # the runner ends a run that is at work, and the run its stages

logger = logging.getLogger("flows.deployments")


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the server and the schedule, or register the deployment; return the exit code."""
    command = _parser().parse_args(arguments).command
    console.set_up()
    root = Path.cwd()
    try:
        settings = load_params(root / "params.yaml").flows.training
        if command == "up":
            return up(root, settings)
        with _known_server(root):
            if command == "serve":
                serve(settings)
            else:
                register(settings)
        return 0
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flows.deployments",
        description="The Prefect server, and the schedule of the training flow.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="start server and page, register the deployment, run what is due")
    commands.add_parser("register", help="register the deployment with its schedule on a running server")
    commands.add_parser("serve", help="register the deployment on a running server and run what is due")
    return parser


def register(settings: TrainingFlow) -> UUID:
    """Register the training flow with its schedule; return the id of the deployment."""
    deployment_id: UUID = _deployment(settings).apply()
    logger.info("registered training/%s: %s", NAME, describe(settings))
    return deployment_id


def serve(settings: TrainingFlow) -> None:
    """Register the training flow and run what is due until a signal comes."""
    from prefect import serve as serve_deployments

    serve_deployments(_deployment(settings), pause_on_shutdown=False, print_starting_message=False)


def describe(settings: TrainingFlow) -> str:
    """Say the schedule in words."""
    return (
        f"cron {settings.cron} ({settings.timezone})" if settings.cron else "no schedule; runs by hand only"
    )


def _deployment(settings: TrainingFlow) -> Any:
    from prefect.client.schemas.schedules import CronSchedule
    from prefect.types.entrypoint import EntrypointType

    from flows.training_flow import training

    schedule = CronSchedule(cron=settings.cron, timezone=settings.timezone) if settings.cron else None
    return training.to_deployment(
        NAME,
        schedules=[schedule] if schedule else [],
        description="Bring model, evaluation and card up to date. The schedule is in params.yaml.",
        # A path would put flows/ first on the import path.
        entrypoint_type=EntrypointType.MODULE_PATH,
    )


def up(root: Path, settings: TrainingFlow) -> int:
    """Run the server and the process that runs what is due, until a signal; then end both."""
    host = os.environ.get("PREFECT_SERVER_API_HOST", "127.0.0.1")
    port = int(os.environ.get("PREFECT_SERVER_API_PORT", "4200"))
    url = f"http://{host}:{port}/api"
    if server.is_up(url):
        raise InputError(
            f"a Prefect server already answers at {url}",
            "use it (python -m flows.deployments serve), or take another port: PREFECT_SERVER_API_PORT=4300",
        )
    os.environ[leftovers.RUN_ID_VARIABLE] = f"up-{os.getpid()}-{time.time_ns()}"
    with ExitStack() as stack:
        stack.enter_context(_signals_end_it())
        stack.enter_context(leftovers.watchdog(os.environ[leftovers.RUN_ID_VARIABLE]))
        api = server.start(host, port, root / FOLDER / "server.log")
        stack.callback(server.stop, api)
        server.wait_until_up(url, api)
        server.announce(root, url)
        stack.callback((root / FOLDER / "server.json").unlink, missing_ok=True)
        runner = _start_runner(url)
        stack.callback(server.stop, runner, signal.SIGINT, STOP_PATIENCE_S)
        logger.info(
            "Prefect's page: http://%s:%d · training: %s · Ctrl-C ends it", host, port, describe(settings)
        )
        return _watch({"the Prefect server": api, "the process that runs what is due": runner})


def _start_runner(url: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "flows.deployments", "serve"],
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
def _signals_end_it() -> Iterator[None]:
    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _known_server(root: Path) -> Iterator[None]:
    """Find the server that runs already.

    Raises:
        InputError: none answers.
    """
    url = server.configured_url() or server.announced_url(root) or server.DEFAULT_URL
    if not server.is_up(url):
        raise InputError(
            f"no Prefect server answers at {url}", "start one with `make up`, or set PREFECT_API_URL"
        )
    with server.environment("PREFECT_API_URL", url):
        yield


if __name__ == "__main__":
    sys.exit(main())
