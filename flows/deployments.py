"""The deployments of the flows: `perennial schedule` registers them on a Prefect server.

Schedules are those of `flows` in params.yaml; a drift verdict triggers a retraining by an event.
Due runs are executed by `make up`, on any other machine with this checkout by `perennial schedule --serve`,
or by the workers of a work pool (`--pool NAME`).
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from flows.common import prefect_api
from flows.common.cli import run_command
from flows.watch.event import DRIFT_EVENT
from stages.common.errors import InputError
from stages.common.params.loading import load_params
from stages.common.params.loop import Flows

if TYPE_CHECKING:
    from uuid import UUID

    from prefect import Flow
    from prefect.deployments.runner import RunnerDeployment

logger = logging.getLogger("flows.deployments")


def main(arguments: Sequence[str] | None = None) -> int:
    """Register the flows on a running server, or serve them; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="perennial schedule",
        description="Register the flows and their schedules (params.yaml) on a running Prefect server.",
    )
    parser.add_argument("--serve", action="store_true", help="also execute due runs, until Ctrl-C")
    parser.add_argument(
        "--pool", metavar="NAME", help="register for this work pool, whose workers execute due runs"
    )
    options = parser.parse_args(arguments)
    if options.serve and options.pool:
        parser.error("--serve and --pool exclude each other: a pool's workers execute due runs")
    return run_command(lambda: _deploy(Path.cwd(), options))


def _deploy(root: Path, options: argparse.Namespace) -> int:
    settings = load_params(root / "params.yaml").flows
    with _running_server(root):
        if not options.serve:
            register(settings, options.pool)
            return 0
        with suppress(KeyboardInterrupt):
            serve(settings)
    return 0


@dataclass(frozen=True)
class Timetable:
    """When a flow runs: by a cron expression, and on a Prefect event."""

    flow: str
    name: str
    description: str
    cron: str | None
    timezone: str
    on_event: str | None = None

    def __str__(self) -> str:
        when = [f"cron {self.cron} ({self.timezone})"] if self.cron else []
        when += [f"on {self.on_event}"] if self.on_event else []
        return " and ".join(when) or "no schedule, by hand only"


def make_timetables(settings: Flows) -> list[Timetable]:
    """Return when each flow runs."""
    training, watch, retrain = settings.training, settings.watch, settings.retrain
    return [
        Timetable(
            "training",
            "scheduled",
            "Bring model, evaluation and card up to date.",
            training.cron,
            training.timezone,
        ),
        Timetable(
            "watch",
            "scheduled",
            "Test new traffic for drift, and trigger a retraining.",
            watch.cron,
            watch.timezone,
        ),
        Timetable(
            "retrain",
            "on-drift",
            "Train a candidate on feedback from production; promote it if it is better.",
            retrain.cron,
            retrain.timezone,
            DRIFT_EVENT if watch.retrain else None,
        ),
        Timetable(
            "release",
            "by-hand",
            "Promote, roll back or pin a version; only this flow moves aliases.",
            None,
            "UTC",
        ),
    ]


def register(settings: Flows, pool: str | None = None) -> list[UUID]:
    """Register the flows with their schedules; return the ids of the deployments.

    Args:
        pool: the work pool whose workers execute the runs; None: `serve` does.
    """
    ids = []
    for timetable in make_timetables(settings):
        ids.append(cast("UUID", _deployment(timetable, pool).apply()))
        logger.info("registered %s/%s: %s", timetable.flow, timetable.name, timetable)
    return ids


def serve(settings: Flows) -> None:
    """Register the flows and execute due runs, until a signal."""
    import prefect

    deployments = [_deployment(timetable, None) for timetable in make_timetables(settings)]
    prefect.serve(*deployments, pause_on_shutdown=False, print_starting_message=False)


def _deployment(timetable: Timetable, pool: str | None) -> RunnerDeployment:
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.client.schemas.schedules import CronSchedule
    from prefect.events import DeploymentEventTrigger, DeploymentTriggerTypes, TriggerTypes
    from prefect.types.entrypoint import EntrypointType

    from flows.release.flow import release
    from flows.retrain.flow import retrain
    from flows.training.flow import training
    from flows.watch.flow import watch

    flow: Flow[Any, Any] = {flow.name: flow for flow in (training, watch, retrain, release)}[timetable.flow]
    triggers: list[DeploymentTriggerTypes | TriggerTypes] = []
    if timetable.on_event:
        payload = {key: f"{{{{ event.payload.{key} }}}}" for key in ("reason", "verdict", "since")}
        triggers = [
            DeploymentEventTrigger(
                name=f"{timetable.flow} on drift", expect={timetable.on_event}, parameters=payload
            )
        ]
    where: dict[str, Any] = {}
    if pool is not None:
        # A worker's process begins in the checkout, as `make` does: stages and flows are found there.
        where = {"work_pool_name": pool, "job_variables": {"working_dir": str(Path.cwd())}}
    deployment = flow.to_deployment(
        timetable.name,
        schedules=[CronSchedule(cron=timetable.cron, timezone=timetable.timezone)] if timetable.cron else [],
        triggers=triggers,
        # After a night without a server process all runs of the night are late, and would start at once.
        concurrency_limit=ConcurrencyLimitConfig(
            limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW
        ),
        description=f"{timetable.description} Its schedule is in params.yaml.",
        # A path would put flows/ first on the import path.
        entrypoint_type=EntrypointType.MODULE_PATH,
        **where,
    )
    return cast("RunnerDeployment", deployment)


@contextmanager
def _running_server(root: Path) -> Iterator[None]:
    """Let Prefect's clients use the running server for the block.

    Raises:
        InputError: none answers, or it asks for a secret that this checkout has not.
    """
    url = prefect_api.read_configured_url() or prefect_api.read_announced_url(root) or prefect_api.DEFAULT_URL
    if not prefect_api.is_up(url):
        fix = "start one with `make up`, or set PREFECT_API_URL"
        raise InputError(f"no Prefect server answers at {url}", fix)
    if not prefect_api.lets_in(root, url):
        fix = "set PREFECT_API_AUTH_STRING to its user:password, or PREFECT_API_URL to another server"
        raise InputError(f"the Prefect server at {url} is not ours and asks for its secret", fix)
    with prefect_api.set_api(root, url):
        yield


if __name__ == "__main__":
    sys.exit(main())
