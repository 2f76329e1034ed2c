"""One retraining at a time, and a record that outlives a kill."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest

from flows.common.clock import Moment
from flows.retrain import progress
from stages.common.errors import InputError


def test_a_retraining_is_set_down_step_by_step_and_ends_in_the_history(tmp_path):
    with progress.lock(tmp_path) as mine:
        assert mine
        run = progress.start(tmp_path, "drift", "w1", "m:1", since=10.0, now=1_800_000_000.0)
        assert (run.id, run.step, run.until) == ("20270115T080000", "gather", 1_800_000_000.0)
        steps = [run.step]
        while run.step != "canary":
            run = progress.advance(tmp_path, run)
            steps.append(run.step)
            assert progress.read_state(tmp_path) == run
        assert tuple(steps) == progress.STEPS
        ended = progress.finish(tmp_path, run, "promoted", "better")
    assert progress.read_state(tmp_path) is None
    assert progress.read_history(tmp_path) == [ended]
    assert (ended.outcome, ended.summary, ended.champion) == ("promoted", "better", "m:1")


def test_what_a_step_found_goes_with_the_record(tmp_path):
    run = progress.start(tmp_path, "drift", None, "m:1", since=0.0)
    progress.advance(tmp_path, run, candidate="m:2")
    assert progress.read_state(tmp_path).candidate == "m:2"


def test_killed_between_its_last_two_files_it_ends_once(tmp_path):
    run = progress.start(tmp_path, "drift", None, "m:1", since=0.0)
    ended = progress.finish(tmp_path, run, "rejected", "worse")
    progress.save_state(tmp_path, run)  # as if the record had outlived the kill
    progress.finish(tmp_path, run, "rejected", "worse")
    assert progress.read_history(tmp_path) == [ended]
    assert progress.read_state(tmp_path) is None


def test_only_one_process_works_on_a_retraining_and_a_killed_one_gives_way(tmp_path):
    hold = (
        "import sys, time; from pathlib import Path; from flows.retrain import progress\n"
        "with progress.lock(Path(sys.argv[1])) as mine:\n"
        "    print(mine, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "True\n"
        assert progress.is_running(tmp_path)
        with progress.lock(tmp_path) as mine:
            assert not mine
    finally:
        process.kill()
        process.wait()
    assert not progress.is_running(tmp_path)
    with progress.lock(tmp_path) as mine:
        assert mine


@pytest.mark.parametrize("name", ["retrain.json", "retrainings.jsonl"])
def test_a_record_of_something_else_is_named_with_its_fix(tmp_path, name):
    (tmp_path / ".perennial").mkdir()
    (tmp_path / ".perennial" / name).write_text('{"id": "x"}\n')
    read = {"retrain.json": progress.read_state, "retrainings.jsonl": progress.read_history}[name]
    with pytest.raises(InputError, match=rf"{name} is not .*\n  fix: remove"):
        read(tmp_path)


YEAR_S = 365 * 86_400.0


def end_at(root, moment):
    """End a retraining at a moment; return its result."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "read_moment", lambda: moment)
        return progress.finish(
            root, progress.start(root, "drift", None, "m:1", since=0.0), "rejected", "worse"
        )


def test_without_a_retraining_there_is_no_pause(tmp_path):
    assert progress.measure_pause(tmp_path, Moment(1.0, "boot", 1.0)) is None


@pytest.mark.parametrize("set_by_s", [-YEAR_S, 0.0, YEAR_S])
def test_the_pause_after_a_retraining_is_as_long_as_it_was_however_the_clock_is_set(tmp_path, set_by_s):
    end_at(tmp_path, Moment(2 * YEAR_S, "boot", 100.0))
    assert progress.measure_pause(tmp_path, Moment(2 * YEAR_S + set_by_s, "boot", 3700.0)) == 3600.0


def test_an_end_in_the_future_counts_from_the_first_look_after_the_machine_was_started_again(tmp_path):
    end_at(tmp_path, Moment(2 * YEAR_S, "boot", 100.0))
    now = Moment(YEAR_S, "another", 5.0)
    assert progress.measure_pause(tmp_path, now) == 0.0
    assert progress.measure_pause(tmp_path, Moment(YEAR_S + 60.0, "another", 65.0)) == 60.0
    assert progress.measure_pause(tmp_path, Moment(YEAR_S + 90.0, "a third", 1.0)) == 90.0


def test_the_history_of_an_older_version_has_no_second_clock(tmp_path):
    result = end_at(tmp_path, Moment(1000.0, "boot", 100.0))
    path = tmp_path / progress.HISTORY
    path.write_text(json.dumps({k: v for k, v in asdict(result).items() if k != "ended"}) + "\n")
    assert progress.measure_pause(tmp_path, Moment(1060.0, "boot", 9.0)) == 60.0
