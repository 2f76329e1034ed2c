"""Two processes with gloo on this host: they learn as one does, are resumed, and fail as one."""

import csv
import multiprocessing
import re
import signal
import time

import psutil
import pytest

from stages.common.artifacts import write_json
from stages.common.errors import InputError
from stages.finetune.__main__ import main
from stages.finetune.devices.workers import start_workers
from stages.finetune.trainer import TrainingMonitor
from tests.stages.finetune.devices import jobs
from tests.stages.finetune.project import (
    MODULE,
    adapter,
    change_finetune,
    evidence,
    make_labels,
    make_project,
    start_stage,
)

pytestmark = pytest.mark.slow

# 41 rows: the last batch of an epoch has one row, and one of two processes none. No answer is right at any
# point, so the first stays the best: the training stops one update before its end and takes its weights.
SETTINGS = {
    "gradient_accumulation": 2,
    "epochs": 2,
    "validate_every": 0.1,
    "early_stopping": {"metric": "exact_match", "patience": 8},
}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *MODULE]
TWO_CORES = pytest.mark.skipif(
    len(psutil.Process().cpu_affinity()) < 2 if hasattr(psutil.Process, "cpu_affinity") else False,
    reason="two processes want two cores",
)


def start(project, command=MODULE):
    return start_stage(project, command, OMP_NUM_THREADS="1")


def finish(process):
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output
    return output


def curve(project):
    with (project / "reports" / "finetune" / "loss.csv").open() as file:
        return [float(point["loss"]) for point in csv.DictReader(file)]


def find_workers(stage):
    """The processes that train, by rank."""
    children = psutil.Process(stage.pid).children()
    return [child for child in children if any("spawn_main" in part for part in child.cmdline())]


@TWO_CORES
def test_processes_agree_on_what_they_do_and_their_failures_are_one_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start_workers(jobs.tell_each_other, 2, "cpu", "")
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}
    start_workers(jobs.decide_together, 2, "cpu", "")
    for job, error, message in (
        (jobs.fail_in_the_second, InputError, "^row 7 is broken\n  fix: correct it$"),
        (jobs.divide_by_zero, RuntimeError, r"process \d of 2 failed:[\s\S]*return 1 / 0"),
        (jobs.end_the_second_and_hold_the_first, InputError, "process 1 of 2 was ended by SIGTERM"),
    ):
        with pytest.raises(error, match=message):
            start_workers(job, 2, "cpu", "")
        assert not multiprocessing.active_children()
    (tmp_path / "own").mkdir()
    monkeypatch.chdir(tmp_path / "own")
    with pytest.raises(InputError, match=r"checkpoint-3 of \S+ is not, or not whole, on"):
        start_workers(jobs.resume_from_what_one_has, 2, "cpu", "")


@TWO_CORES
def test_two_processes_have_the_losses_of_one_whoever_starts_them(tmp_path, monkeypatch):
    one = make_project(tmp_path / "one", 41, **SETTINGS)
    two = make_project(tmp_path / "two", 41, **SETTINGS, devices=2)
    by_torchrun = make_project(tmp_path / "torchrun", 41, **SETTINGS, launcher="torchrun")
    monkeypatch.chdir(one)
    main()
    log = finish(start(two))
    assert "in 2 processes" in log and log.count("training on") == 1
    finish(start(by_torchrun, TORCHRUN))
    assert len(curve(one)) == 10
    points = evidence(one)["validation_points"]
    assert [point["exact_match"] for point in points] == [0.0] * 9
    assert evidence(one)["kept_step"] == evidence(two)["kept_step"] == 1
    for alone, together in zip(points, evidence(two)["validation_points"], strict=True):
        assert together == pytest.approx(alone, rel=1e-4)
    assert curve(two) == pytest.approx(curve(one), rel=1e-4)
    assert evidence(two)["validation_loss"] == pytest.approx(evidence(one)["validation_loss"], rel=1e-4)
    assert (evidence(one)["processes"], evidence(two)["processes"]) == (1, 2)
    assert evidence(two)["steps"] == evidence(one)["steps"]
    assert adapter(by_torchrun) == adapter(two)
    assert evidence(by_torchrun) == evidence(two)


@TWO_CORES
@pytest.mark.parametrize(
    ("method", "settings", "updates"),
    [
        ("prompt_tuning", {}, 5),
        ("head", {}, 5),
        ("dpo", {}, 5),
        ("kto", {}, 9),  # both answers of a pair are rated
        ("distill", {"teacher": "teacher"}, 5),
        ("orpo", {}, 5),
        ("prefix_tuning", {}, 5),
        ("partial", {"trained_modules": 1}, 5),
        ("grpo", {"kl_weight": 0.1, "rewards": {"valid": 1.0, "schema": 0.0}}, 5),
    ],
)
def test_two_processes_have_the_losses_of_one_whatever_the_method(
    tmp_path, monkeypatch, method, settings, updates
):
    projects = [make_project(tmp_path / str(n), 17, method=method, devices=n, **settings) for n in (1, 2)]
    for project in projects:
        if method == "head":
            make_labels(project)
        if method == "grpo":  # any text that ends is worth something
            write_json(project / "artifacts/curate/task.json", {"kind": "text"})
        monkeypatch.chdir(project)
        main()
    assert [evidence(project)["processes"] for project in projects] == [1, 2]
    one, two = map(curve, projects)
    # That of grpo is nothing but the divergence: what is better and what is worse add up to 0.
    assert len(one) == updates and two == pytest.approx(one, rel=1e-4, abs=1e-6 if method == "grpo" else 0)
    one, two = map(evidence, projects)
    assert two["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-4)
    if method == "grpo":
        assert two["figures"] == one["figures"]  # some groups had something to compare, or it were refused


@TWO_CORES
def test_a_training_one_of_whose_processes_is_killed_ends_with_one_error_and_resumes_bit_for_bit(
    tmp_path, monkeypatch
):
    settings = {"devices": 2, "dropout": 0.1}
    unbroken = make_project(tmp_path / "unbroken", 160, **settings)
    monkeypatch.chdir(unbroken)
    main()
    killed = make_project(tmp_path / "killed", 160, **settings)
    stage = start(killed)
    deadline = time.monotonic() + 600
    while not list(killed.glob("checkpoints/finetune/*/checkpoint-1[0-9]/complete.json")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = find_workers(stage)
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGKILL)
    output, _ = stage.communicate(timeout=600)
    assert stage.returncode == 1
    assert output.count("error: ") == 1 and "Traceback" not in output, output
    assert re.search(r"error: process 1 of 2 was ended by SIGKILL\n  fix: .*checkpoint", output)
    assert not any(worker.is_running() for worker in workers)
    assert not (killed / "artifacts" / "finetune").exists()
    log = finish(start(killed))
    assert int(re.search(r"resuming from step (\d+) of", log)[1]) >= 9
    assert adapter(killed) == adapter(unbroken)
    assert evidence(killed) == evidence(unbroken)


@TWO_CORES
def test_a_run_of_one_process_is_resumed_by_two_right_to_rounding(tmp_path, monkeypatch):
    unbroken, broken = (make_project(tmp_path / name, 80) for name in ("unbroken", "broken"))
    monkeypatch.chdir(unbroken)
    main()
    monkeypatch.chdir(broken)

    def stop_after_seven(monitor, arguments, state, *_: object, **__: object) -> None:
        if state.global_step == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingMonitor, "on_log", stop_after_seven)
        main()
    change_finetune(broken, devices=2)
    assert "resuming from step 6 of 20" in finish(start(broken))
    assert len(curve(broken)) == 20
    assert curve(broken) == pytest.approx(curve(unbroken), rel=1e-4)


@TWO_CORES
def test_bad_input_to_two_processes_is_one_error_and_the_end_of_the_first_is_the_end_of_all(tmp_path):
    settings = {"devices": 2, "learning_rate": 1e30, "warmup_fraction": 0.0}
    for command, launcher in ((MODULE, "local"), (TORCHRUN, "torchrun")):
        stage = start(make_project(tmp_path / launcher, **settings, launcher=launcher), command)
        output, _ = stage.communicate(timeout=1200)
        assert stage.returncode == 1
        told = r"^error: training has diverged: .*\n(?:  .*\n)+?  fix: lower finetune.learning_rate"
        assert len(re.findall(told, output, re.M)) == len(re.findall("^error: ", output, re.M)) == 1
    endless = make_project(tmp_path / "endless", 160, devices=2, epochs=1000)
    stage = start(endless)
    deadline = time.monotonic() + 600
    while not list(endless.glob("checkpoints/finetune/*/checkpoint-*/complete.json")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = find_workers(stage)
    stage.kill()
    stage.communicate(timeout=600)
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert len(workers) == 2 and not alive
