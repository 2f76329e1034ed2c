"""The retraining loop as one whole, over a real DVC graph, on a user's own rows."""

import subprocess

import pytest

from flows import gate, retrain_run
from tests.flows.loop_home import corrected, held_out, learned, make_loop_home

pytestmark = pytest.mark.slow


@pytest.fixture
def home(tmp_path):
    return make_loop_home(tmp_path)


def test_two_triggers_at_once_are_one_retraining_and_the_gate_refuses_what_learned_nothing(home):
    before, named = home.aliases, {tag: info.aliases for tag, info in home.versions().items()}
    command = home.command("-m", "flows.retrain", "--why", "more tickets")
    both = [
        subprocess.Popen(
            command, cwd=home.root, env=home.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        said = sorted(process.communicate(timeout=240)[0].strip().splitlines()[-1] for process in both)
    finally:
        for process in both:
            process.kill()
            process.wait()
    assert [process.returncode for process in both] == [0, 0]
    assert said[0] == "another process retrains already" and said[1].startswith("refused: by the gate"), said

    (ended,) = retrain_run.history(home.root)
    assert (ended.outcome, ended.champion) == ("refused", before.champion)
    assert retrain_run.unfinished(home.root) is None
    assert not gate.read_verdict(home.root, ended.candidate).passed
    versions = home.versions()
    assert versions[ended.candidate].gate == "refused"
    assert home.aliases == before
    assert {tag: versions[tag].aliases for tag in named} == named and versions[ended.candidate].aliases == ()

    kept, trained = held_out(home), learned(home)
    assert kept and kept <= corrected() and not kept & trained
    assert trained & corrected()
