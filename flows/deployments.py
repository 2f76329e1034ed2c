"""The schedule of the training flow: `python -m flows.deployments` registers it on a running server.

The schedule is `flows.training` in params.yaml. Runs that are due are executed by `make up`, or on any
other machine with this checkout by `python -m flows.deployments --execute`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from flows import console, server
from stages.common.errors import InputError
from stages.common.params import TrainingFlow, load_params

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.deployments.runner import RunnerDeployment

NAME = "scheduled"

logger = logging.getLogger("flows.deployments")


def main(arguments: Sequence[str] | None = None) -> int:
    """Register the deployment on a running server; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.deployments",
        description="Register the training flow and its schedule (params.yaml) on a running Prefect server.",
    )
    parser.add_argument(
        "--execute", action="store_true", help="also execute the runs that are due, until Ctrl-C"
    )
    options = parser.parse_args(arguments)
    console.set_up()
    root = Path.cwd()
    try:
        settings = load_params(root / "params.yaml").flows.training
        with _running_server(root):
            if options.execute:
                execute(settings)
            else:
                register(settings)
        return 0
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 0


def register(settings: TrainingFlow) -> UUID:
    """Register the training flow with its schedule; return the id of the deployment."""
    deployment_id = cast("UUID", _deployment(settings).apply())
    logger.info("registered training/%s: %s", NAME, describe(settings))
    return deployment_id


def execute(settings: TrainingFlow) -> None:
    """Register the training flow and execute the runs that are due, until a signal comes."""
    from prefect import serve

    serve(_deployment(settings), pause_on_shutdown=False, print_starting_message=False)


def describe(settings: TrainingFlow) -> str:
    """Say the schedule in words."""
    return f"cron {settings.cron} ({settings.timezone})" if settings.cron else "no schedule, by hand only"


def _deployment(settings: TrainingFlow) -> RunnerDeployment:
    from prefect.client.schemas.schedules import CronSchedule
    from prefect.types.entrypoint import EntrypointType

    from flows.training_flow import training

    schedule = CronSchedule(cron=settings.cron, timezone=settings.timezone) if settings.cron else None
    deployment = training.to_deployment(
        NAME,
        schedules=[schedule] if schedule else [],
        description="Bring model, evaluation and card up to date. The schedule is in params.yaml.",
        # A path would put flows/ first on the import path.
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    return cast("RunnerDeployment", deployment)


@contextmanager
def _running_server(root: Path) -> Iterator[None]:
    """Find the server that runs already.

    Raises:
        InputError: none answers.
    """
    url = server.configured_url() or server.announced_url(root) or server.DEFAULT_URL
    if not server.is_up(url):
        remedy = "start one with `make up`, or set PREFECT_API_URL"
        raise InputError(f"no Prefect server answers at {url}", remedy)
    with server.environment("PREFECT_API_URL", url):
        yield


if __name__ == "__main__":
    sys.exit(main())
