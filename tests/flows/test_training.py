import signal
import subprocess
import sys
import time

from tests.flows.toy import kill, make_toy


def test_a_first_run_runs_every_stage_in_order_and_shows_it_in_prefect(toy, api):
    done = toy.run()

    assert done.returncode == 0, done.stderr
    begun = toy.begun()
    assert sorted(begun[:2]) == ["fetch", "read"] and begun[2:] == ["train", "judge"]
    run = api.last_run()
    assert (run["name"], run["state_type"]) == ("first run", "COMPLETED")
    assert api.task_states(run) == dict.fromkeys(("fetch", "read", "train", "judge"), "Completed")
    assert "first run: 4 ran" in done.stdout


def test_stage_lines_reach_prefects_log_and_progress_becomes_a_bar(toy, api):
    toy.run()

    run = api.last_run()
    lines = api.log_lines(run)["train"]
    assert lines[0] == "begins" and "wrote train.txt" in lines
    assert len([line for line in lines if "loss 0.5" in line]) <= 3, (
        "200 progress lines are not 200 log lines"
    )
    assert "200/200 loss 0.5" in lines
    bar = api.artifacts(run)["train-progress"]
    assert bar["type"] == "progress" and bar["data"] == 100.0


def test_nothing_runs_again_when_nothing_changed(toy, api):
    toy.run()
    toy.forget()

    done = toy.run()

    assert done.returncode == 0 and toy.begun() == []
    run = api.last_run()
    assert run["name"] == "nothing changed"
    assert set(api.task_states(run).values()) == {"Unchanged"}


def test_a_changed_parameter_runs_its_stage_and_what_follows_and_names_the_run(toy, api):
    toy.run()
    toy.forget()
    toy.change("params.yaml", "learning_rate: 0.001", "learning_rate: 0.002")

    done = toy.run()

    assert done.returncode == 0 and toy.begun() == ["train"]
    run = api.last_run()
    assert run["name"] == "params finetune.learning_rate 0.001→0.002"
    # train wrote the same bytes as before, so judge had nothing to do: DVC decides, stage by stage.
    assert api.task_states(run)["judge"] == "Unchanged"


def test_independent_stages_run_side_by_side(tmp_path, clean_environment, api):
    toy = make_toy(tmp_path, {**clean_environment, "PREFECT_API_URL": api.url}, seconds=1.5)

    assert toy.run().returncode == 0

    at = {(name, what): when for name, what, when in toy.log()}
    assert max(at["fetch", "begin"], at["read", "begin"]) < min(at["fetch", "end"], at["read", "end"])


def test_the_flow_writes_the_same_bytes_as_dvc_repro(tmp_path, clean_environment, api):
    environment = {**clean_environment, "PREFECT_API_URL": api.url}
    by_dvc = make_toy(tmp_path / "dvc", environment)
    by_flow = make_toy(tmp_path / "flow", environment)
    # The stage that DVC takes first ends last.
    by_flow.trouble("fetch-slow", "0.5")
    by_flow.trouble("read-slow", "0.2")

    assert by_dvc.dvc("repro").returncode == 0
    assert by_flow.run().returncode == 0

    assert by_flow.outputs() == by_dvc.outputs()
    assert by_flow.dvc("status", "-q").returncode == 0
    assert "up to date" in by_flow.dvc("repro").stdout


def test_a_failed_stage_says_why_stops_what_follows_and_keeps_the_rest(toy, api):
    toy.trouble("train-fails", "1 error: row 3 has no answer\n  remedy: mend data/in.txt")

    done = toy.run()

    assert done.returncode == 1
    assert (
        "error: train failed: row 3 has no answer\n  remedy: mend data/in.txt\nnot run: judge" in done.stderr
    )
    assert "Traceback" not in done.stderr and "NoneType" not in done.stderr
    run = api.last_run()
    assert run["state_type"] == "FAILED"
    states = api.task_states(run)
    assert (states["train"], states["judge"]) == ("Failed", "NotReady")
    (toy.root / "trouble" / "train-fails").unlink()
    toy.forget()
    assert toy.run().returncode == 0 and toy.begun() == ["train", "judge"]
    assert api.last_run()["name"] == "unfinished train"


def test_a_stage_that_finds_wrong_parameters_ends_the_run_with_2(toy):
    toy.trouble("train-fails", "2 error: finetune.rank: 0 is too small\n  remedy: mend params.yaml")

    assert toy.run().returncode == 2


def test_only_a_passing_trouble_is_tried_again(toy, api):
    toy.change("params.yaml", "retry_delay_s: 10", "retry_delay_s: 0")
    toy.trouble("fetch-fails", "75 error: the hub does not answer\n  remedy: wait")
    toy.trouble("fetch-recovers", "yes")
    toy.trouble("read-fails", "1 error: bad rows\n  remedy: mend them")

    done = toy.run()

    assert done.returncode == 1
    assert sorted(toy.begun()) == ["fetch", "fetch", "read"]
    states = api.task_states(api.last_run())
    assert (states["fetch"], states["read"]) == ("Completed", "Failed")


def test_wrong_parameters_end_with_2_within_three_seconds_before_prefect_is_imported(offline_toy):
    offline_toy.change("params.yaml", "learning_rate: 0.001", "learning_rat: fast")
    started = time.monotonic()

    done = offline_toy.run(PYTHONPROFILEIMPORTTIME="1")

    assert done.returncode == 2 and time.monotonic() - started < 3
    assert "learning_rat" in done.stderr and "error: " in done.stderr
    assert "| prefect\n" not in done.stderr and "| dvc\n" not in done.stderr


def test_until_runs_a_stage_and_what_it_needs_only(toy):
    assert toy.run("--until", "train").returncode == 0
    assert sorted(toy.begun()) == ["fetch", "read", "train"]


def test_an_unknown_stage_is_named_with_the_known_ones(offline_toy):
    done = offline_toy.run("--until", "tarin")

    assert done.returncode == 1
    assert "no stage 'tarin'" in done.stderr and "fetch, judge, read, train" in done.stderr


def test_after_kill_9_no_stage_lives_on_and_the_next_run_says_so_and_goes_on(toy):
    toy.trouble("train-slow", "60")
    process = toy.start()
    toy.wait_for("train")
    stages = [one for one in toy.processes() if "work/stage.py" in " ".join(one.cmdline())]
    assert stages

    kill(process)
    process.communicate()

    for stage in stages:
        stage.wait(timeout=15)
    (toy.root / "trouble" / "train-slow").unlink()
    toy.forget()
    done = toy.run()
    assert done.returncode == 0, done.stderr
    assert (
        f"the last run (pid {process.pid}, started " in done.stderr
        and "was killed during train" in done.stderr
    )
    assert toy.begun() == ["train", "judge"]


def test_after_kill_9_of_everything_but_the_stage_the_next_run_ends_it_first(toy):
    toy.trouble("train-slow", "60")
    process = toy.start()
    toy.wait_for("train")
    everything = toy.processes()
    orphans = [one for one in everything if "work/stage.py" in " ".join(one.cmdline())]
    for one in everything:
        if one not in orphans:
            one.kill()
    process.communicate()
    assert orphans[-1].is_running()
    (toy.root / "trouble" / "train-slow").unlink()
    toy.forget()

    done = toy.run()

    assert done.returncode == 0, done.stderr
    assert "process" in done.stderr and "left behind" in done.stderr
    assert not any(one.is_running() for one in orphans)
    assert toy.begun() == ["train", "judge"]


def test_when_dvc_alone_is_killed_the_stage_ends_with_it_and_the_flow_says_so(toy):
    toy.trouble("train-slow", "60")
    process = toy.start()
    toy.wait_for("train")
    (dvc,) = [one for one in toy.processes() if one.cmdline()[1:3] == ["-m", "dvc"]]

    dvc.kill()
    _, err = process.communicate(timeout=20)

    assert process.returncode == 1 and "train failed: it was killed by signal 9" in err
    assert not [one for one in toy.processes() if "work/stage.py" in " ".join(one.cmdline())]


def test_a_second_run_waits_for_the_first_and_says_for_whom(toy):
    toy.trouble("train-slow", "3")
    first = toy.start()
    toy.wait_for("train")

    refused = toy.run("--no-wait")
    second = toy.run()

    assert refused.returncode == 1
    assert f"another run is at work in this folder (pid {first.pid}, started " in refused.stderr
    assert "at train)" in refused.stderr
    assert (
        second.returncode == 0 and f"pid {first.pid}" in second.stderr and "waiting for it" in second.stderr
    )
    assert first.wait(timeout=30) == 0
    assert sorted(toy.begun()) == ["fetch", "judge", "read", "train"], "nothing ran twice"


def test_a_run_beside_dvc_repro_waits_and_says_for_whom(toy):
    toy.trouble("read-slow", "3")
    by_dvc = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "read"],
        cwd=toy.root,
        env=toy.environment,
        stdout=subprocess.DEVNULL,
    )
    toy.wait_for("read")

    refused = toy.run("--no-wait")
    done = toy.run()

    assert refused.returncode == 1 and f"DVC is at work in this folder (pid {by_dvc.pid}: " in refused.stderr
    assert done.returncode == 0 and "waiting for it" in done.stderr
    assert by_dvc.wait() == 0
    assert toy.begun().count("read") == 1


def test_a_dvc_repro_started_during_a_run_is_refused_by_dvc_and_the_run_goes_on(toy):
    toy.trouble("train-slow", "3")
    process = toy.start()
    toy.wait_for("train")

    by_dvc = toy.dvc("repro", "--single-item", "train")

    assert by_dvc.returncode != 0 and "is busy" in by_dvc.stderr
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_stage_blocked_by_another_dvc_waits_for_it(toy):
    toy.trouble("fetch-slow", "4")
    process = toy.start()
    toy.wait_for("fetch")
    toy.trouble("train-slow", "3")
    # A plain repro of read, done already, and then of train with fetch missing cannot be had; so read anew.
    toy.write("data/in.txt", "other rows\n")
    toy.trouble("read-slow", "6")
    by_dvc = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "read"],
        cwd=toy.root,
        env=toy.environment,
        stdout=subprocess.DEVNULL,
    )
    _, err = process.communicate(timeout=90)

    assert process.returncode == 0, err
    assert by_dvc.wait() == 0


def test_ctrl_c_ends_the_stage_and_the_run_in_good_order(toy, api):
    toy.trouble("train-slow", "60")
    process = toy.start()
    toy.wait_for("train")

    kill(process, signal.SIGINT)
    _, err = process.communicate(timeout=30)

    assert process.returncode == 130, err
    assert "stopped; finished stages are kept" in err
    assert not (toy.root / ".perennial" / "run.json").exists()
    assert not [one for one in toy.processes() if "work/stage.py" in " ".join(one.cmdline())]
    assert api.last_run()["state_type"] == "CANCELLED"


def test_sigterm_ends_a_run_with_143(toy):
    toy.trouble("train-slow", "60")
    process = toy.start()
    toy.wait_for("train")

    kill(process, signal.SIGTERM)
    process.communicate(timeout=30)

    assert process.returncode == 143
    assert not [one for one in toy.processes() if "work/stage.py" in " ".join(one.cmdline())]


def test_a_run_with_no_server_starts_one_for_itself_and_ends_it(offline_toy):
    done = offline_toy.run()

    assert done.returncode == 0, done.stderr
    assert "View at" not in done.stderr and "Error logging to API" not in done.stderr
    assert offline_toy.processes() == []


def test_the_results_are_shown_and_become_a_table(toy, api):
    toy.write(
        "reports/evaluate/metrics.json",
        '{"base": {"exact_match": {"value": 0.0, "low": 0.0, "high": 0.01, "n": 400}},'
        ' "tuned": {"exact_match": {"value": 0.74, "low": 0.70, "high": 0.78, "n": 400}},'
        ' "difference": {"exact_match": {"value": 0.74, "low": 0.70, "high": 0.78, "p_value": 0.0001}}}',
    )
    toy.write("reports/model_card/README.md", "# A model\n")

    done = toy.run()

    assert "exact match  0.00 (0.00 to 0.01)  0.74 (0.70 to 0.78)  +0.74, p < 0.001" in done.stdout
    assert "reports/model_card/README.md" in done.stdout
    artifacts = api.artifacts(api.last_run())
    assert artifacts["results"]["type"] == "table" and artifacts["model-card"]["data"] == "# A model\n"
