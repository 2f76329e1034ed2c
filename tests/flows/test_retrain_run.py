"""One retraining at a time, and a record that outlives a kill."""

import subprocess
import sys

import pytest

from flows import retrain_run
from stages.common.errors import InputError


def test_a_retraining_is_set_down_step_by_step_and_ends_in_the_history(tmp_path):
    with retrain_run.working(tmp_path) as mine:
        assert mine
        run = retrain_run.begin(tmp_path, "drift", "w1", "m:1", since=10.0, now=1_800_000_000.0)
        assert (run.id, run.step, run.until) == ("20270115T080000", "gather", 1_800_000_000.0)
        steps = [run.step]
        while run.step != "canary":
            run = retrain_run.advance(tmp_path, run)
            steps.append(run.step)
            assert retrain_run.unfinished(tmp_path) == run
        assert tuple(steps) == retrain_run.STEPS
        ended = retrain_run.finish(tmp_path, run, "promoted", "better")
    assert retrain_run.unfinished(tmp_path) is None
    assert retrain_run.history(tmp_path) == [ended]
    assert (ended.outcome, ended.said, ended.champion) == ("promoted", "better", "m:1")


def test_what_a_step_found_goes_with_the_record(tmp_path):
    run = retrain_run.begin(tmp_path, "drift", None, "m:1", since=0.0)
    retrain_run.advance(tmp_path, run, candidate="m:2")
    assert retrain_run.unfinished(tmp_path).candidate == "m:2"


def test_killed_between_its_last_two_files_it_ends_once(tmp_path):
    run = retrain_run.begin(tmp_path, "drift", None, "m:1", since=0.0)
    ended = retrain_run.finish(tmp_path, run, "refused", "worse")
    retrain_run.save(tmp_path, run)  # as if the record had outlived the kill
    retrain_run.finish(tmp_path, run, "refused", "worse")
    assert retrain_run.history(tmp_path) == [ended]
    assert retrain_run.unfinished(tmp_path) is None


def test_only_one_process_works_on_a_retraining_and_a_killed_one_gives_way(tmp_path):
    hold = (
        "import sys, time; from pathlib import Path; from flows import retrain_run\n"
        "with retrain_run.working(Path(sys.argv[1])) as mine:\n"
        "    print(mine, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "True\n"
        assert retrain_run.is_running(tmp_path)
        with retrain_run.working(tmp_path) as mine:
            assert not mine
    finally:
        process.kill()
        process.wait()
    assert not retrain_run.is_running(tmp_path)
    with retrain_run.working(tmp_path) as mine:
        assert mine


@pytest.mark.parametrize("name", ["retrain.json", "retrainings.jsonl"])
def test_a_record_of_something_else_is_named_with_its_remedy(tmp_path, name):
    (tmp_path / ".perennial").mkdir()
    (tmp_path / ".perennial" / name).write_text('{"id": "x"}\n')
    read = {"retrain.json": retrain_run.unfinished, "retrainings.jsonl": retrain_run.history}[name]
    with pytest.raises(InputError, match=rf"{name} is no record .*\n  remedy: remove"):
        read(tmp_path)
