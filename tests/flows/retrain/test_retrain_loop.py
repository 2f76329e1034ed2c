"""The retraining loop as one whole, over a real DVC graph, on a user's own rows."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from flows.gate.verdict import read_verdict
from flows.retrain import progress
from flows.training import run_lock
from stages.common.artifacts import STATE
from tests.flows.loop_home import LEARNING, corrected, held_out, learned, make_loop_home

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def home(tmp_path_factory, trained_home):
    home = make_loop_home(trained_home, tmp_path_factory.mktemp("loop"))
    yield home
    for process in home.processes():
        process.kill()


def bearers(home):
    """Return what MLflow's aliases point to."""
    return {alias: info.tag for info in home.versions().values() for alias in info.aliases}


def wait_until_none_is_left(home):
    """Wait for what a killed retraining left to be ended; fail if it stays."""
    deadline = time.monotonic() + 60
    while (left := home.processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [process.cmdline() for process in left]


def retrain_twice_at_once(home, why):
    """Start two retrainings, and return both when they have ended."""
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(home.retrain, (why, why)))


def test_killed_at_every_step_before_users_see_it_two_triggers_at_once_go_on_with_one_retraining(home, api):
    """It has learned nothing, so the gate refuses it, and no alias has moved."""
    home = home.reporting_to(api)  # the servers that runs start themselves are those of the next test
    before, named = home.aliases, bearers(home)
    folder = home.root / STATE

    def at(step):
        left = progress.read_state(home.root)
        return left is not None and left.step == step

    def in_a_stage():
        record = run_lock.read_record(folder)
        return at("train") and record is not None and bool(record.stages)

    def asking():
        return at("gate") and any(folder.glob("gate-service-*/owner.json"))

    ids = set()
    for is_time in (lambda: at("gather"), in_a_stage, lambda: at("record"), asking):
        home.kill_retraining("killed", is_time)
        ids.add(progress.read_state(home.root).id)
        assert (home.aliases, bearers(home)) == (before, named)
    (one,) = ids

    both = retrain_twice_at_once(home, "more tickets")
    assert [done.returncode for done in both] == [0, 0], [done.stderr for done in both]
    last, first = sorted(both, key=lambda done: done.stdout.startswith("rejected: by the gate"))
    assert last.stdout.strip() == "another process is retraining already"
    assert f"continuing the retraining {one} (killed) at step gate" in first.stderr
    assert first.stdout.startswith("rejected: by the gate"), first.stdout
    (ended,) = progress.read_history(home.root)
    assert (ended.id, ended.outcome, ended.champion) == (one, "rejected", before.champion)
    assert progress.read_state(home.root) is None
    assert not read_verdict(home.root, ended.candidate).passed
    assert home.versions()[ended.candidate].gate == "rejected"
    assert (home.aliases, bearers(home)) == (before, named)
    kept, trained = held_out(home), learned(home)
    assert kept and kept <= corrected() and not kept & trained
    assert trained & corrected()
    wait_until_none_is_left(home)


def test_killed_while_some_users_see_it_the_trial_goes_on_and_ends_in_one_promotion(home):
    before, known = home.aliases, progress.read_history(home.root)
    silence = {"max_minutes": 0.05, "on_timeout": "promote"}
    home.change(LEARNING | {f"flows.retrain.canary.{name}": value for name, value in silence.items()})
    home.kill_retraining("better training", lambda: home.aliases.challenger is not None)
    left = progress.read_state(home.root)
    assert left.step == "canary" and left.candidate == home.aliases.challenger.tag
    assert read_verdict(home.root, left.candidate).passed
    assert home.versions()[left.candidate].gate == "passed"
    assert home.aliases.champion == before.champion
    # MLflow mirrors the file and may not know the challenger yet: the kill can fall between the two.
    mirrored = {"champion": before.champion, "challenger": left.candidate}
    assert bearers(home) in (mirrored, {"champion": before.champion})

    done = home.retrain("once more")
    assert done.returncode == 0, done.stderr
    assert f"continuing the retraining {left.id} (better training) at step canary" in done.stderr
    assert done.stdout.startswith(f"promoted: {left.candidate}"), done.stdout
    *earlier, ended = progress.read_history(home.root)
    assert earlier == known and (ended.id, ended.outcome) == (left.id, "promoted")
    assert (home.aliases.champion, home.aliases.challenger) == (left.candidate, None)
    assert bearers(home) == {"champion": left.candidate}
    wait_until_none_is_left(home)
