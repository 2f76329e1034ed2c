"""A whole sweep of a tiny model: killed, continued, pruned, applied, and its best a candidate."""

import csv
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from xml.etree import ElementTree

import pytest

from flows.registry.model_versions import list_recorded
from flows.registry.tracking import Registry
from stages.common.artifacts import read_json
from tests.flows.loop_home import copy_home
from tests.flows.sweep.toy_sweep import make_toy_sweep

KILL_WITHIN_S = 600
SWEEP = {
    "finetune.learning_rate": 0.01,
    "finetune.epochs": 4,
    "finetune.checkpoint_every_steps": 2,
    "split.validation_fraction": 0.15,
    "flows.sweep.space": {
        "finetune.learning_rate": {"choices": [0.01, 0.02, 1.0e-7]},
        "finetune.validate_every": {"choices": [0.25]},
    },
    "flows.sweep.trials": 3,
    "flows.sweep.startup_trials": 1,
    "finetune.validate_every": 0.25,
}


def start(root, environment, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "flows.sweep", *arguments],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(process):
    """Kill a sweep that is still at work, and its process group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_until(is_time, process):
    deadline = time.monotonic() + KILL_WITHIN_S
    while not is_time():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it was never time"
        time.sleep(0.02)


def read_trials(root):
    with (root / "reports/sweep/trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_and_its_best_becomes_a_candidate(tmp_path, trained_home, api):
    home = copy_home(trained_home, tmp_path).reporting_to(api)
    home.change(SWEEP)
    before = (home.root / "reports/evaluate/metrics.json").read_bytes()
    checkpoints = home.root / ".perennial/sweep/checkout/checkpoints/finetune"
    process = start(home.root, home.environment)
    try:
        wait_until(lambda: any(checkpoints.glob("*/checkpoint-*/complete.json")), process)
    finally:
        end(process)
    done = start(home.root, home.environment)
    try:
        out, _ = done.communicate(timeout=900)
    finally:
        end(done)
    assert done.returncode == 0, out
    assert "was killed" in out and "resuming" in out, out
    trials = read_trials(home.root)
    assert [one["trial"] for one in trials] == ["1", "2", "3"]
    states = {one["finetune.learning_rate"]: one["state"] for one in trials}
    assert trials[0]["finetune.learning_rate"] == "0.01" and states["0.01"] == "complete"
    assert states["1e-07"] == "pruned"
    ElementTree.parse(home.root / "reports/sweep/trials.svg")
    complete = [one for one in trials if one["state"] == "complete"]
    best = min(complete, key=lambda one: float(one["loss"]))
    # The workspace has what it had.
    assert home.params().finetune.epochs == 4 and home.params().finetune.learning_rate == 0.01
    assert read_json(home.root / "reports/finetune/metrics.json")["steps"] < 10
    shown = home.run("-m", "dvc", "exp", "show", "--csv", "--no-pager").stdout
    assert all(one["experiment"] in shown for one in complete)
    assert read_json(home.root / "reports/sweep/sweep.json")["best"]["experiment"] == best["experiment"]

    home.run("-m", "dvc", "exp", "apply", best["experiment"])
    applied = (home.root / "artifacts/finetune/adapter_model.safetensors").read_bytes()
    assert "up to date" in home.run("-m", "dvc", "status", "finetune").stdout

    assert "params.yaml has the values of trial" in home.run("-m", "flows.sweep", "--apply").stdout
    assert home.params().finetune.learning_rate == float(best["finetune.learning_rate"])
    trained = home.run("-m", "flows.training")
    assert (home.root / "artifacts/finetune/adapter_model.safetensors").read_bytes() == applied
    assert "updates in" not in trained.stdout + trained.stderr  # the training came out of the cache
    assert (home.root / "reports/evaluate/metrics.json").read_bytes() != before
    assert len(list_recorded(Registry.of(home.root, home.params()))) == 2


@pytest.mark.slow
def test_ctrl_c_ends_a_sweep_in_order_and_a_second_one_is_refused(tmp_path, clean_environment, api):
    toy = make_toy_sweep(tmp_path, clean_environment)
    environment = {**clean_environment, "PREFECT_API_URL": api.url}
    text = (toy.root / "params.yaml").read_text()
    (toy.root / "params.yaml").write_text(text.replace("trials: 12", "trials: 4"))
    first = start(toy.root, environment)
    try:
        wait_until((toy.root / "reports/sweep/trials.csv").exists, first)
        second = start(toy.root, environment)
        out, _ = second.communicate(timeout=300)
        assert second.returncode == 1 and "another sweep is at work in this folder" in out
        first.send_signal(signal.SIGINT)
        out, _ = first.communicate(timeout=300)
        assert first.returncode == 130, out
        assert "the next sweep goes on from there" in out and "Traceback" not in out
    finally:
        end(first)
    kept = len(read_trials(toy.root))
    assert 1 <= kept < 4
    again = start(toy.root, environment)
    out, _ = again.communicate(timeout=300)
    assert again.returncode == 0, out
    assert f"{kept} of 4 trials are done" in out and "4 trials: " in out
    artifact = api.artifacts(api.last_run())["sweep"]
    assert artifact["type"] == "table" and "sweep-" in artifact["data"]


@pytest.mark.slow
def test_a_sweep_whose_trials_all_fail_ends_with_the_reason(tmp_path, clean_environment, api):
    toy = make_toy_sweep(tmp_path, clean_environment)
    text = (toy.root / "params.yaml").read_text()
    (toy.root / "params.yaml").write_text(text.replace("choices: [8, 16, 32]", "choices: [800, 1600]"))
    process = start(toy.root, {**clean_environment, "PREFECT_API_URL": api.url})
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "all 3 trials failed; the last one: preflight: rank " in out and "Traceback" not in out
    assert [one["state"] for one in read_trials(toy.root)] == ["failed"] * 3
