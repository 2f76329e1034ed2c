import signal
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from flows.common import prefect_api
from flows.release.actions import LOCK
from flows.watch.event import DRIFT_EVENT
from stages.common import network
from stages.common.locks import hold_lock
from tests.flows.toy import Api


def start(toy, *command: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=toy.root,
        env={**toy.environment, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_until(condition, timeout_s: float, what: str):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} within {timeout_s} s"
        time.sleep(0.5)
    return found


@pytest.mark.slow
def test_one_command_registers_the_schedule_of_params_yaml(finished, api):
    finished.change("params.yaml", "cron: 0 3 * * 1", "cron: 30 2 * * *")
    finished.change("params.yaml", "timezone: UTC", "timezone: Europe/Madrid")

    process = start(finished, "flows.deployments")
    out, _ = process.communicate(timeout=300)

    assert process.returncode == 0, out
    assert "registered training/scheduled: cron 30 2 * * * (Europe/Madrid)" in out
    deployments = {row["entrypoint"].rpartition(".")[2]: row for row in api.rows("deployments")}
    assert sorted(deployments) == ["release", "retrain", "training", "watch"]
    # A night's missed runs must not all begin at once in the morning.
    assert {row["global_concurrency_limit"]["limit"] for row in deployments.values()} == {1}
    deployment = deployments["training"]
    (schedule,) = deployment["schedules"]
    assert schedule["active"]
    assert (schedule["schedule"]["cron"], schedule["schedule"]["timezone"]) == ("30 2 * * *", "Europe/Madrid")
    assert deployment["entrypoint"] == "flows.training.flow.training"
    (trigger,) = [one["trigger"] for one in api.automations() if one["name"].startswith("retrain")]
    assert trigger["expect"] == ["perennial.drift"]


def test_without_a_server_registering_says_how_to_start_one(offline):
    nowhere = f"http://127.0.0.1:{network.free_port()}/api"

    process = start(offline, "flows.deployments", PREFECT_API_URL=nowhere)
    out, _ = process.communicate(timeout=300)

    assert process.returncode == 1
    assert f"error: no Prefect server answers at {nowhere}\n  fix: start one with `make up`" in out


@pytest.mark.slow
def test_up_shows_the_page_executes_what_is_due_and_ends_with_all_it_started(finished, tmp_path):
    """With SQLAlchemy 2.1 Prefect's cron schedules never fire, and no other check finds it."""
    finished.change("params.yaml", "cron: 0 3 * * 1", 'cron: "* * * * *"')
    finished.change("params.yaml", "learning_rate: 0.003", "learning_rate: 0.002")
    for key in ("dashboard: 8000", "mlflow: 5000", "evidently: 8001", "port: 3000"):
        finished.change("params.yaml", f" {key} ", f" {key.split(':')[0]}: {network.free_port()} ")
    port = network.free_port()
    url = f"http://127.0.0.1:{port}/api"
    environment = {"PREFECT_HOME": str(tmp_path / "home"), "PREFECT_SERVER_API_PORT": str(port)}
    for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING"):
        finished.environment.pop(name)
    process = start(finished, "flows.up", **environment)
    try:
        wait_until(lambda: prefect_api.is_up(url), 60, "the server is up")
        api = Api(url, str(prefect_api.read_auth_string(finished.root, url)))
        wait_until(lambda: "train" in finished.begun(), 120, "a run by the schedule begins")

        def done():
            runs = api.rows("flow_runs", flow_runs={"state": {"type": {"any_": ["COMPLETED"]}}})
            return [run for run in runs if run["name"] == "params finetune.learning_rate 0.003→0.002"]

        (run,) = wait_until(done, 60, "it ends, named for what changed")
        assert run["auto_scheduled"]
        # A run by hand goes to the same server, found without any setting.
        by_hand = finished.run(PREFECT_HOME=environment["PREFECT_HOME"])
        assert by_hand.returncode == 0 and f"View at http://127.0.0.1:{port}/" in by_hand.stderr
    finally:
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert f"prefect is up at http://127.0.0.1:{port}/" in out
    assert finished.processes() == []


def emit(api, payload: dict[str, object]) -> None:
    """Tell the server of drift, as the watching flow does."""
    event = {
        "id": str(uuid.uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": DRIFT_EVENT,
        "resource": {"prefect.resource.id": "perennial.model.toy"},
        "payload": payload,
    }
    httpx.post(f"{api.url}/events", json=[event], auth=api.auth, timeout=30).raise_for_status()


@contextmanager
def executing(toy, api, *command: str):
    """Have a process register and execute in the checkout until the block ends; yield what it logs."""
    log, before = toy.root / "faults" / "execute.log", triggers(api)
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=toy.root,
            env=toy.environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        # Registered again, the trigger gets a new id: an older one would do for the event, not for the run.
        wait_until(lambda: triggers(api) - before, 90, "the trigger is registered")
        yield log
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=300)


def triggers(api) -> set[str]:
    return {one["id"] for one in api.automations() if one["name"].startswith("retrain")}


def runs_of(api, verdict: str, state: str) -> list[dict[str, Any]]:
    """Return the runs that a verdict has started and that are in a state now."""
    runs = api.rows("flow_runs", flow_runs={"state": {"type": {"any_": [state]}}})
    return [run for run in runs if run["parameters"].get("verdict") == verdict]


def called_for(api, since: float | None, state: str) -> dict[str, Any]:
    """Tell of drift; return the retraining that follows, once it is in a state."""
    verdict = f"w-{uuid.uuid4()}"
    payload = {"reason": 'a "quoted" {{ reason }} of {100 %} $x', "verdict": verdict, "since": since}
    emit(api, payload)
    (run,) = wait_until(lambda: runs_of(api, verdict, state), 90, f"the retraining is {state}")
    assert run["parameters"] == payload
    return run


@pytest.mark.slow
def test_a_drift_event_has_the_retraining_executed_once_at_a_time_with_what_the_verdict_says(finished, api):
    with executing(finished, api, "flows.deployments", "--serve"):
        run = called_for(api, 1750000000.25, "FAILED")
        assert f"{finished.root}/artifacts/export/serving.json does not exist" in run["state"]["message"]

        with hold_lock(finished.root / LOCK):  # a release, whose end the retraining waits for
            first = called_for(api, None, "RUNNING")
            called_for(api, None, "CANCELLED")
        wait_until(lambda: runs_of(api, first["parameters"]["verdict"], "FAILED"), 90, "the first goes on")


@pytest.mark.slow
def test_a_worker_of_a_pool_executes_in_the_checkout(finished, api):
    def prefect(*words: str) -> None:
        # From elsewhere: what a run finds, it finds because it begins in the checkout.
        command, environment = [sys.executable, "-m", "prefect", *words], finished.environment
        subprocess.run(command, cwd="/", env=environment, check=True, timeout=300)

    prefect("work-pool", "create", "trainers", "--type", "process")
    out, _ = start(finished, "flows.deployments", "--pool", "trainers").communicate(timeout=300)
    assert "registered retrain/on-drift" in out
    (deployment,) = [row for row in api.rows("deployments") if row["name"] == "on-drift"]
    assert deployment["work_pool_name"] == "trainers"
    new_run = f"{api.url}/deployments/{deployment['id']}/create_flow_run"
    answer = httpx.post(new_run, json={}, auth=api.auth, timeout=30)

    prefect("worker", "start", "--pool", "trainers", "--type", "process", "--run-once")

    run = httpx.get(f"{api.url}/flow_runs/{answer.json()['id']}", auth=api.auth, timeout=30).json()
    assert f"{finished.root}/artifacts/export/serving.json does not exist" in run["state"]["message"]
