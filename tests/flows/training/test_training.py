import signal
import time

import pytest

from tests.flows.toy import kill, make_toy

STAGES = ("fetch", "read", "train", "judge")


def test_a_first_run_runs_every_stage_in_order_and_shows_it_in_prefect(toy, api):
    done = toy.run()

    assert done.returncode == 0, done.stderr
    assert "first run: 4 ran" in done.stdout
    begun = toy.begun()
    assert sorted(begun[:2]) == ["fetch", "read"] and begun[2:] == ["train", "judge"]
    run = api.last_run()
    assert (run["name"], run["state_type"]) == ("first run", "COMPLETED")
    assert api.task_states(run) == dict.fromkeys(STAGES, "Completed")
    # Each line of a stage is in the log of its task, but 200 lines of progress are one bar.
    lines = api.log_lines(run)["train"]
    assert lines[0] == "begins" and "wrote train.txt" in lines and "200/200 loss 0.5" in lines
    assert len([line for line in lines if "loss 0.5" in line]) <= 3
    bar = api.artifacts(run)["train-progress"]
    assert bar["type"] == "progress" and bar["data"] == 100.0


@pytest.mark.slow
def test_nothing_runs_again_when_nothing_changed_and_the_results_are_shown_and_become_a_table(finished, api):
    finished.write(
        "reports/evaluate/metrics.json",
        '{"base": {"exact_match": {"value": 0.0, "low": 0.0, "high": 0.01, "n": 400}},'
        ' "tuned": {"exact_match": {"value": 0.74, "low": 0.70, "high": 0.78, "n": 400}},'
        ' "difference": {"exact_match": {"value": 0.74, "low": 0.70, "high": 0.78, "p_value": 0.0001}},'
        ' "resolution": {"statement": "400 rows show differences of 0.04."}}',
    )
    finished.write("reports/model_card/README.md", "# A model\n")

    done = finished.run()

    assert done.returncode == 0 and finished.begun() == []
    run = api.last_run()
    assert run["name"] == "nothing changed"
    assert api.task_states(run) == dict.fromkeys(STAGES, "Unchanged")
    row = "exact match  0.00 (0.00 to 0.01)  0.74 (0.70 to 0.78)  +0.74, p < 0.001"
    assert row in done.stdout
    assert "400 rows show differences of 0.04." in done.stdout
    assert "reports/model_card/README.md" in done.stdout
    artifacts = api.artifacts(run)
    assert artifacts["results"]["type"] == "table"
    assert artifacts["model-card"]["data"] == "# A model\n"


@pytest.mark.slow
def test_a_changed_parameter_runs_its_stage_and_names_the_run(retrain, api):
    assert retrain.run().returncode == 0

    # train wrote the same bytes as before, so judge had nothing to do: DVC decides, stage by stage.
    assert retrain.begun() == ["train"]
    run = api.last_run()
    assert run["name"] == "params finetune.learning_rate 0.003→0.002"
    assert api.task_states(run)["judge"] == "Unchanged"


@pytest.mark.slow
def test_force_runs_everything_again(finished, api):
    assert finished.run("--force", "--until", "train").returncode == 0

    assert sorted(finished.begun()) == ["fetch", "read", "train"]
    assert api.last_run()["name"] == "forced"


@pytest.mark.slow
def test_independent_stages_run_side_by_side_and_give_the_bytes_of_dvc_repro(toy, finished_toy):
    # Each waits for the other: one after the other, the first would never end.
    toy.inject_fault("fetch-waits", "read begin")
    toy.inject_fault("read-waits", "fetch end")

    done = toy.run()

    assert done.returncode == 0, done.stderr
    assert [(name, what) for name, what, _ in toy.log() if name in ("fetch", "read")][2:] == [
        ("fetch", "end"),
        ("read", "end"),
    ]
    assert toy.outputs() == finished_toy.outputs()
    assert "up to date" in toy.dvc("repro").stdout


def test_a_failed_stage_says_why_stops_what_follows_and_is_not_tried_again(retrain, api):
    retrain.inject_fault("train-fails", "1 error: row 3 has no answer\n  fix: edit data/in.txt")

    done = retrain.run()

    assert done.returncode == 1
    assert "error: train failed: row 3 has no answer\n  fix: edit data/in.txt\nnot run: judge" in done.stderr
    assert "Traceback" not in done.stderr and "NoneType" not in done.stderr
    assert retrain.begun() == ["train"]
    run = api.last_run()
    assert run["state_type"] == "FAILED"
    states = api.task_states(run)
    assert (states["train"], states["judge"]) == ("Failed", "NotReady")


@pytest.mark.slow
def test_a_stage_that_finds_wrong_parameters_ends_the_run_with_2(retrain):
    retrain.inject_fault("train-fails", "2 error: finetune.rank: 0 is too small\n  fix: edit params.yaml")

    assert retrain.run().returncode == 2


@pytest.mark.slow
def test_a_transient_error_is_tried_again(retrain, api):
    retrain.change("params.yaml", "retry_delay_s: 10", "retry_delay_s: 0")
    retrain.inject_fault("train-fails", "75 error: the hub does not answer\n  fix: wait")
    retrain.inject_fault("train-recovers", "yes")

    done = retrain.run("--until", "train")

    assert done.returncode == 0, done.stderr
    assert retrain.begun() == ["train", "train"]
    assert api.task_states(api.last_run())["train"] == "Completed"


def test_wrong_parameters_end_with_2_before_prefect_is_imported(finished):
    finished.change("params.yaml", "learning_rate: 0.003", "learning_rat: fast")

    done = finished.run(PYTHONPROFILEIMPORTTIME="1")

    assert done.returncode == 2
    assert "learning_rat" in done.stderr and "error: " in done.stderr
    assert "| prefect\n" not in done.stderr and "| dvc\n" not in done.stderr


def test_an_unknown_stage_is_named_with_the_known_ones(finished):
    done = finished.run("--until", "tarin")

    assert done.returncode == 1
    assert "no stage 'tarin'" in done.stderr and "fetch, judge, read, train" in done.stderr


@pytest.mark.slow
def test_after_kill_9_no_stage_lives_on_and_the_next_run_says_so_and_goes_on(retrain):
    retrain.inject_fault("train-slow", "60")
    process = retrain.start("--until", "train")
    retrain.wait_for("train")
    stages = retrain.stage_processes()
    assert stages

    kill(process)
    process.communicate()

    for stage in stages:
        stage.wait(timeout=300)
    (retrain.root / "faults" / "train-slow").unlink()
    retrain.forget()
    done = retrain.run("--until", "train")
    assert done.returncode == 0, done.stderr
    assert f"the last run (pid {process.pid}, started " in done.stderr
    assert "was killed during train" in done.stderr
    assert retrain.begun() == ["train"]


@pytest.mark.slow
def test_after_kill_9_of_everything_but_the_stage_the_next_run_ends_it_first(retrain):
    retrain.inject_fault("train-slow", "60")
    process = retrain.start("--until", "train")
    retrain.wait_for("train")
    orphans = retrain.stage_processes()
    for one in retrain.processes():
        if one not in orphans:
            one.kill()
    process.communicate()
    assert orphans[-1].is_running()
    (retrain.root / "faults" / "train-slow").unlink()
    retrain.forget()

    done = retrain.run("--until", "train")

    assert done.returncode == 0, done.stderr
    assert "left behind" in done.stderr
    assert not any(one.is_running() for one in orphans)
    assert retrain.begun() == ["train"]


@pytest.mark.slow
def test_when_dvc_alone_is_killed_the_stage_ends_with_it_and_the_flow_says_so(retrain):
    retrain.inject_fault("train-slow", "60")
    process = retrain.start()
    retrain.wait_for("train")
    (dvc,) = [one for one in retrain.processes() if one.cmdline()[1:3] == ["-m", "dvc"]]

    dvc.kill()
    _, err = process.communicate(timeout=300)

    assert process.returncode == 1 and "train failed: it was killed by signal 9" in err
    assert retrain.stage_processes() == []


@pytest.mark.slow
def test_a_second_run_waits_for_the_first_and_says_for_whom(retrain):
    retrain.inject_fault("train-slow", "12")
    first = retrain.start("--until", "train")
    retrain.wait_for("train")

    refused = retrain.run("--no-wait")
    second = retrain.run("--until", "train")

    assert refused.returncode == 1
    assert f"another run is at work in this folder (pid {first.pid}, started " in refused.stderr
    assert "at train)" in refused.stderr
    assert second.returncode == 0
    assert f"pid {first.pid}" in second.stderr and "waiting for it" in second.stderr
    assert first.wait(timeout=300) == 0
    assert retrain.begun() == ["train"], "nothing ran twice"


@pytest.mark.slow
def test_a_run_beside_dvc_repro_waits_and_says_for_whom(retrain):
    retrain.inject_fault("train-slow", "12")
    by_dvc = retrain.start_dvc("repro", "train")
    retrain.wait_for("train")

    refused = retrain.run("--no-wait")
    done = retrain.run("--until", "train")

    assert refused.returncode == 1
    assert f"DVC is at work in this folder (pid {by_dvc.pid}: " in refused.stderr
    assert done.returncode == 0 and "waiting for it" in done.stderr
    assert by_dvc.wait() == 0
    assert retrain.begun() == ["train"]


@pytest.mark.slow
def test_a_stage_that_meets_another_dvc_waits_for_it(toy):
    toy.inject_fault("fetch-slow", "8")
    process = toy.start()
    toy.wait_for("fetch")
    while ("read", "end") not in {(name, what) for name, what, _ in toy.log()}:
        time.sleep(0.1)
    time.sleep(1.5)
    # Somebody changes the data during the run, and starts DVC for it; train then meets that DVC.
    toy.write("data/in.txt", "other rows\n")
    toy.inject_fault("read-slow", "10")
    by_dvc = toy.start_dvc("repro", "read")
    _, err = process.communicate(timeout=300)

    assert process.returncode == 0, err
    assert f"another DVC process writes the same files (pid {by_dvc.pid}: " in err
    assert by_dvc.wait() == 0


@pytest.mark.slow
def test_a_dvc_repro_started_during_a_run_is_refused_by_dvc_and_the_run_goes_on(retrain):
    retrain.inject_fault("train-waits", "dvc ended")  # however long DVC takes to start
    process = retrain.start()
    retrain.wait_for("train")

    by_dvc = retrain.dvc("repro", "--single-item", "train")
    with (retrain.root / "faults" / "ran").open("a") as ran:
        ran.write(f"dvc ended {time.time()}\n")

    assert by_dvc.returncode != 0 and "is busy" in by_dvc.stderr
    process.communicate(timeout=300)
    assert process.returncode == 0


@pytest.mark.slow
def test_ctrl_c_ends_the_stage_and_the_run_in_good_order(retrain, api):
    retrain.inject_fault("train-slow", "60")
    process = retrain.start()
    retrain.wait_for("train")

    kill(process, signal.SIGINT)
    _, err = process.communicate(timeout=300)

    assert process.returncode == 130, err
    assert "stopped; finished stages are kept" in err
    assert not (retrain.root / ".perennial" / "run.json").exists()
    assert retrain.stage_processes() == []
    run = api.last_run()
    assert run["state_type"] == "CANCELLED"
    assert api.task_states(run)["train"] == "Cancelled"
    assert "KeyboardInterrupt" not in err


@pytest.mark.slow
def test_sigterm_ends_a_run_with_143(retrain):
    retrain.inject_fault("train-slow", "60")
    process = retrain.start()
    retrain.wait_for("train")

    kill(process, signal.SIGTERM)
    process.communicate(timeout=300)

    assert process.returncode == 143
    assert retrain.stage_processes() == []


@pytest.mark.slow
def test_a_run_with_no_server_starts_one_for_itself_and_ends_it(tmp_path, clean_environment):
    toy = make_toy(tmp_path, clean_environment)

    done = toy.run("--until", "read")

    assert done.returncode == 0, done.stderr
    assert "View at" not in done.stderr and "Error logging to API" not in done.stderr
    assert toy.processes() == []


# A user's changes: text of params.yaml -> its replacement, and the name that Prefect must show unchanged.
PROMPT = "Answer with one intent as JSON."
CHANGES = {
    "sources": (
        "    - kind: feedback",
        "    - {kind: file, path: 'data/{mine}.csv', license: mit}\n    - kind: feedback",
        "params collect.sources 2 entries→3 entries",
    ),
    "list": (
        "data/feedback/rows.jsonl",
        "data/{0}/%(rows)s.jsonl",
        "params collect.sources.1.path data/feedback/rows.jsonl→data/{0}/%(rows)s.jsonl",
    ),
    "mapping": (
        "    language: {min",
        "    '{new} 5%': {max_cramers_v: 0.2, min_representation_ratio: 0.5}\n    language: {min",
        "params check_bias.groups.{new} 5% none→{'max_cramers_v': 0.2, …",
    ),
    "braces": (
        PROMPT,
        "'{a} {} {0} }{ {{ }}'",
        "params task.system_prompt Answer with one intent …→{a} {} {0} }{ {{ }}",
    ),
    "percent": (
        PROMPT,
        "'100 % of %s %(a)s'",
        "params task.system_prompt Answer with one intent …→100 % of %s %(a)s",
    ),
    "dollars": (
        PROMPT,
        "'$5 ${a} $x^{2}$'",
        "params task.system_prompt Answer with one intent …→$5 ${a} $x^{2}$",
    ),
    "markup": (
        PROMPT,
        "'[/bold] [red] :x:'",
        "params task.system_prompt Answer with one intent …→[/bold] [red] :x:",
    ),
    "lines": (PROMPT, '"one\\ntwo"', "params task.system_prompt Answer with one intent …→one two"),
    "long": (
        PROMPT,
        f"'{'{x} %s $y ' * 30}'",
        "params task.system_prompt Answer with one intent …→{x} %s $y {x} %s $y {x}…",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_second_run_is_named_after_any_change_of_the_parameters(finished, api, change):
    old, new, name = CHANGES[change]
    finished.change("params.yaml", old, new)

    done = finished.run()

    assert done.returncode == 0, done.stderr
    assert f"{name}: 1 ran" in done.stdout
    assert api.last_run()["name"] == name
