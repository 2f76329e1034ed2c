"""Run everything under one supervisor: `perennial up`, or `make up`.

Starts the service, Prefect's server and a runner for due flow runs, MLflow, Evidently and the dashboard. A
program that dies is restarted; all of them end with this process, on Ctrl-C, SIGTERM or its death.

The ports are `flows.pages` and `services.port` in params.yaml. PREFECT_SERVER_API_HOST and
PREFECT_SERVER_API_PORT override `flows.pages.prefect`. PERENNIAL_PAGE_HOSTS has further host names that the
pages accept, separated by commas.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from flows.common import console, guarded_pages, prefect_api, processes
from flows.common.page_secret import make_auth_string, make_link, make_secret
from flows.common.up_state import UP_STATE
from flows.up.supervisor import Program, Supervisor, call_on_signals, check_ports, nothing_missing
from stages.common import network
from stages.common.artifacts import STATE, artifacts, read_json
from stages.common.errors import InputError
from stages.common.params.loading import Params, load_params

LOGS = STATE / "logs"
STOP_PATIENCE_S = 20.0  # the executor ends a run at work, and the run its stages

logger = logging.getLogger("flows.up")


def main(arguments: Sequence[str] | None = None) -> int:
    """Start everything and keep it running; return the exit code."""
    argparse.ArgumentParser(prog="perennial up", description=__doc__).parse_args(arguments)
    console.set_up()
    root = Path.cwd()
    try:
        up(root, load_params(root / "params.yaml"))
        return 0
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 0


def up(root: Path, params: Params) -> None:
    """Keep every program running until a signal; then end them all.

    Raises:
        InputError: a port is taken; nothing was started.
    """
    check_ports(list_ports(params))
    secret = make_secret()
    programs = make_programs(root, params, secret)
    link = make_link(f"http://{network.LOOPBACK}:{params.flows.pages.dashboard}/", secret)
    logger.info("open %s: it opens Prefect, MLflow and Evidently to this browser too", link)
    supervise(root, programs, get_prefect_api_url(params.flows.pages.prefect), secret)


def supervise(root: Path, programs: Sequence[Program], api: str, secret: str) -> None:
    """Keep `programs` running until a signal; end all they started, however this process ends.

    Args:
        api: Prefect's, which runs of this checkout report to meanwhile.
        secret: of the pages, which runs of this checkout send to it.
    """
    run_id = uuid.uuid4().hex
    supervisor = Supervisor(programs, root, root / LOGS, root / UP_STATE)
    with ExitStack() as stack:
        stack.enter_context(call_on_signals(supervisor.stop))
        stack.enter_context(processes.run_watchdog(run_id))
        stack.enter_context(processes.set_variable(processes.RUN_ID_VARIABLE, run_id))
        # What programs started in sessions of their own is not in their groups.
        stack.callback(processes.terminate_orphans, run_id)
        prefect_api.announce(root, api, make_auth_string(secret))
        stack.callback((root / STATE / "server.json").unlink, missing_ok=True)
        names = ", ".join(program.name for program in programs)
        logger.info("starting %s; logs are in %s; Ctrl-C ends all", names, LOGS)
        supervisor.run()
        logger.info("all ended")


def list_ports(params: Params) -> dict[str, tuple[str, int]]:
    """Return what `make up` listens on: key of params.yaml -> host and port."""
    pages = params.flows.pages
    host, port = _prefect_address(pages.prefect)
    wanted = {
        "services.port": (params.services.host, params.services.port),
        "flows.pages.dashboard": (network.LOOPBACK, pages.dashboard),
        _prefect_key(): (host, port),
        "flows.pages.evidently": (network.LOOPBACK, pages.evidently),
    }
    if _mlflow_is_ours(params.flows.tracking.tracking_url):
        wanted["flows.pages.mlflow"] = (network.LOOPBACK, pages.mlflow)
    return wanted


def get_prefect_api_url(port: int) -> str:
    """Return where Prefect's API of `make up` answers."""
    host, port = _prefect_address(port)
    return f"http://{network.find_reachable_host(host)}:{port}/api"


def make_programs(root: Path, params: Params, secret: str) -> tuple[Program, ...]:
    """Return the programs of `make up`, in the order in which they are started; `secret` opens the pages."""
    pages, services = params.flows.pages, params.services
    programs = [
        _dashboard(pages.dashboard, secret),
        _prefect(pages.prefect, secret),
        _executor(get_prefect_api_url(pages.prefect), secret),
        _service(root, services.host, services.port),
    ]
    if _mlflow_is_ours(tracking_url := params.flows.tracking.tracking_url):
        programs.append(_mlflow(pages.mlflow, tracking_url, secret))
    return (*programs, _evidently(pages.evidently, secret))


def _dashboard(port: int, secret: str) -> Program:
    url = f"http://{network.LOOPBACK}:{port}/"
    return Program(
        "dashboard",
        (
            *_module("uvicorn", "--factory", "flows.dashboard.app:make_guarded_app"),
            *("--host", network.LOOPBACK, "--port", str(port), "--log-level", "warning"),
            *("--no-access-log", "--no-proxy-headers"),
        ),
        page=url,
        probe=f"{url}healthz",
        environment={guarded_pages.SECRET: secret},
    )


def _prefect(port: int, secret: str) -> Program:
    api = get_prefect_api_url(port)
    host, port = _prefect_address(port)
    reachable = network.find_reachable_host(host)
    page = f"http://{reachable}:{port}/"
    return Program(
        "prefect",
        guarded_pages.make_command("make_prefect", host, port),
        page=page,
        probe=f"{api}/health",
        environment={
            guarded_pages.SECRET: secret,
            guarded_pages.HOSTS: ",".join(filter(None, (os.environ.get(guarded_pages.HOSTS), reachable))),
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": page.rstrip("/"),
            # Else its page asks port 4200, whatever port this one listens on.
            "PREFECT_SERVER_UI_API_URL": os.environ.get("PREFECT_UI_API_URL", api),
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        },
    )


def _executor(api: str, secret: str) -> Program:
    return Program(
        "executor",
        _module("flows.deployments", "--serve"),
        environment={"PREFECT_API_URL": api, "PREFECT_API_AUTH_STRING": make_auth_string(secret)},
        after=("prefect",),
        end_signal=signal.SIGINT,
        patience_s=STOP_PATIENCE_S,
    )


def _service(root: Path, host: str, port: int) -> Program:
    url = f"http://{network.find_reachable_host(host)}:{port}/"
    return Program(
        "service",
        _module("bentoml", "serve", "services.generation:Generation"),
        page=url,
        probe=f"{url}readyz",
        missing=_all_there(_needs("bentoml", "serve"), lambda: _no_model(root)),
        patience_s=STOP_PATIENCE_S,  # answers being written are finished
    )


def _mlflow(port: int, tracking_url: str, secret: str) -> Program:
    url = f"http://{network.LOOPBACK}:{port}/"
    return Program(
        "mlflow",
        guarded_pages.make_command("make_mlflow", network.LOOPBACK, port),
        page=url,
        probe=f"{url}health",
        environment={
            guarded_pages.SECRET: secret,
            # Not an argument: the URL of a database holds a password, and arguments are for all to see.
            "MLFLOW_BACKEND_STORE_URI": tracking_url,
            "MLFLOW_ARTIFACTS_DESTINATION": str(STATE / "mlflow-artifacts"),
        },
        missing=_needs("mlflow", "monitor"),
    )


def _evidently(port: int, secret: str) -> Program:
    url = f"http://{network.LOOPBACK}:{port}/"
    return Program(
        "evidently",
        guarded_pages.make_command("make_evidently", network.LOOPBACK, port),
        page=url,
        probe=f"{url}api/version",
        environment={
            guarded_pages.SECRET: secret,
            guarded_pages.WORKSPACE: str(STATE / "evidently"),
        },
        missing=_needs("evidently", "monitor"),
    )


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", name, *arguments)


def _needs(package: str, extra: str) -> Callable[[], str | None]:
    def missing() -> str | None:
        if importlib.util.find_spec(package) is None:
            return f"is not installed: pip install '.[{extra}]'"
        return None

    return missing


def _all_there(*checks: Callable[[], str | None]) -> Callable[[], str | None]:
    return lambda: next((reason for check in checks if (reason := check())), nothing_missing())


def _no_model(root: Path) -> str | None:
    """Return the reason why there is no model to serve; None if there is one."""
    if (root / artifacts("export") / "serving.json").exists():
        return None
    try:
        if read_json(root / STATE / "aliases.json").get("champion"):
            return None
    except InputError:
        pass
    return "there is no model yet: make run"


def _mlflow_is_ours(tracking_url: str) -> bool:
    return not tracking_url.startswith(("http://", "https://"))


def _prefect_address(port: int) -> tuple[str, int]:
    host = os.environ.get("PREFECT_SERVER_API_HOST", network.LOOPBACK)
    return host, int(os.environ.get("PREFECT_SERVER_API_PORT", port))


def _prefect_key() -> str:
    return "PREFECT_SERVER_API_PORT" if "PREFECT_SERVER_API_PORT" in os.environ else "flows.pages.prefect"


if __name__ == "__main__":
    sys.exit(main())
