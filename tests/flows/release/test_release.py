"""Releases: what moves, what is refused, and that a kill at any step leaves nothing half-way.

MLflow takes nine seconds to begin with: all but one of the tests have a registry in a JSON file in its place.
"""

import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from flows.gate import judge
from flows.gate.judge import Criterion, GateVerdict
from flows.registry import model_versions
from flows.release import actions
from flows.release.actions import adopt, main, pin_reason, recover, status
from flows.release.journal import INTENT, RELEASES, done_releases, read_releases
from flows.retrain import progress, steps
from services.versions.__main__ import (
    ALIASES,
    Aliases,
    Challenger,
    _write,
    newest_as_champion,
    read_aliases,
    set_champion,
)
from stages.common.artifacts import read_json, write_json, write_text
from stages.common.errors import InputError
from stages.common.params.loading import load_params
from tests.services.serving import ROOT

PARAMS = load_params(ROOT / "params.yaml")
A, B, C = (f"m:{letter * 12}" for letter in "abc")
STEPS = 6  # of a promotion: two aliases in the registry, the served ones, the pin, the record, the intent


class Registry:
    """MLflow's registry, as far as releases use it, in a file."""

    def __init__(self, path):
        self.path = path
        self.tags = {A, B, C}
        self.down = False

    def read(self):
        known = {"champion": None, "challenger": None, "pinned": None}
        return known | (read_json(self.path) if self.path.exists() else {})

    def _change(self, **values):
        if self.down:
            raise InputError("MLflow at sqlite:///x cannot be reached", "start it")
        write_json(self.path, self.read() | values)

    def set_alias(self, root, params, alias, tag):
        if tag is not None and tag not in self.tags:
            raise InputError(f"{tag} is not in MLflow's registry", "record it")
        self._change(**{alias: tag})

    def set_pinned(self, root, params, why):
        self._change(pinned=why)

    def versions_table(self, root, params):
        self._change()
        return [model_versions.VersionInfo(tag, 1, "", 0.0, (), "passed") for tag in self.tags]


@pytest.fixture
def known(tmp_path, monkeypatch):
    """Return the registry of a checkout at `tmp_path`, in whose model store every version lies."""
    found = Registry(tmp_path / "registry.json")
    monkeypatch.setattr("services.versions.__main__.stored", lambda tag: None)
    for name in ("set_alias", "set_pinned", "versions_table"):
        monkeypatch.setattr(model_versions, name, getattr(found, name))
    return found


def judged(root: Path, tag: str, champion: str | None, *, passed: bool = True) -> None:
    """Write a verdict of the gate with a file of evidence."""
    evidence = root / f".perennial/gate/{tag.partition(':')[2]}/answers.json"
    write_text(evidence, f"answers of {tag}")
    criterion = Criterion("old_test", "not forgotten", 0.0, -0.1, 0.1, -0.005, passed, "it forgot 3 points")
    judge.write_verdict(
        root,
        GateVerdict(
            tag, champion, 1.0, passed, "champion", (criterion,), judge.file_hashes(root, [evidence]), {}
        ),
    )


def made(root, action, tag=None, why="because"):
    return actions.release(root, PARAMS, action, tag, "tester", why)


def served(root):
    return read_aliases(root / ALIASES)


def agree(root, known):
    """Return the champion and challenger of which both stores say the same."""
    aliases, recorded = served(root), known.read()
    trial = aliases.challenger.tag if aliases.challenger else None
    assert (aliases.champion, trial) == (recorded["champion"], recorded["challenger"])
    return aliases.champion, trial


def test_a_model_is_promoted_tried_replaced_and_gone_back_to(tmp_path, known):
    judged(tmp_path, A, None)
    made(tmp_path, "promote", A)
    assert agree(tmp_path, known) == (A, None)
    judged(tmp_path, B, A)
    assert made(tmp_path, "try", B).challenger == B
    assert served(tmp_path).challenger == Challenger(B, PARAMS.flows.retrain.canary.share, "canary")
    assert agree(tmp_path, known) == (A, B)
    assert made(tmp_path, "promote", B).former == A
    assert served(tmp_path) == Aliases(B, None, (A,), managed=True)
    assert agree(tmp_path, known) == (B, None)
    back = made(tmp_path, "roll_back", B, why="it fails")
    assert (back.champion, back.former, back.tag, back.why) == (A, B, B, "it fails")
    assert agree(tmp_path, known) == (A, None)
    assert [record.action for record in read_releases(tmp_path)] == ["promote", "try", "promote", "roll_back"]
    with pytest.raises(InputError, match=f"no version was champion before {A}"):
        made(tmp_path, "roll_back")


def test_a_trial_can_be_refused_and_the_champion_stays(tmp_path, known):
    judged(tmp_path, A, None)
    made(tmp_path, "promote", A)
    judged(tmp_path, B, A)
    made(tmp_path, "try", B)
    made(tmp_path, "refuse", B)
    assert agree(tmp_path, known) == (A, None)
    with pytest.raises(InputError, match=f"{A} is the champion"):
        made(tmp_path, "refuse", A)


@pytest.mark.parametrize(
    ("by_hand", "outcome", "said"),
    [
        ("refuse", "refused", "its trial was ended (refuse by tester): too slow"),
        ("promote", "promoted", f"{B} took over from {A}"),
    ],
)
def test_a_retraining_whose_trial_was_ended_by_hand_ends_as_that_says(
    tmp_path, known, by_hand, outcome, said
):
    judged(tmp_path, A, None)
    made(tmp_path, "promote", A)
    judged(tmp_path, B, A)
    made(tmp_path, "try", B)
    with progress.working(tmp_path):
        begun = progress.begin(tmp_path, "drift", None, champion=A, since=0.0)
        killed = progress.save(
            tmp_path, replace(begun, step="canary", candidate=B, on_trial_since=begun.until)
        )
        made(tmp_path, by_hand, B, why="too slow")
        made(tmp_path, "pin", why="an audit")  # what came later did not end the trial
        ended = steps.show_to_some(tmp_path, PARAMS, killed)
    assert (ended.outcome, ended.said) == (outcome, said)
    assert progress.history(tmp_path) == [ended]
    assert progress.unfinished(tmp_path) is None


@pytest.mark.parametrize("action", ["promote", "try"])
def test_what_the_gate_did_not_let_through_moves_nothing(tmp_path, known, action):
    judged(tmp_path, A, None)
    made(tmp_path, "promote", A)
    with pytest.raises(InputError, match=f"{B} was never judged"):
        made(tmp_path, action, B)
    judged(tmp_path, B, A, passed=False)
    with pytest.raises(InputError, match=r"the gate refused m:b+\n  old_test: it forgot 3 points"):
        made(tmp_path, action, B)
    judged(tmp_path, B, C)
    with pytest.raises(InputError, match=f"{B} was judged against {C}, and the champion is {A}"):
        made(tmp_path, action, B)
    judged(tmp_path, B, A)
    write_text(tmp_path / f".perennial/gate/{'b' * 12}/answers.json", "other answers")
    with pytest.raises(
        InputError, match=r"evidence of the verdict on m:b+ is not what it was: .*answers.json"
    ):
        made(tmp_path, action, B)
    assert agree(tmp_path, known) == (A, None)
    assert len(read_releases(tmp_path)) == 1


def test_a_verdict_that_was_changed_by_hand_is_not_believed(tmp_path, known):
    judged(tmp_path, A, None, passed=False)
    path = tmp_path / judge.verdict_path(A)
    write_json(path, read_json(path) | {"passed": True})
    with pytest.raises(InputError, match="says passed: True, and its criteria say otherwise"):
        made(tmp_path, "promote", A)


def test_what_was_worse_on_trial_is_not_promoted_until_it_is_tried_anew(tmp_path, known):
    judged(tmp_path, A, None)
    made(tmp_path, "promote", A)
    judged(tmp_path, B, A)
    begun = made(tmp_path, "try", B)
    report = {"tag": B, "canary": {"state": "bad", "since": begun.at, "said": "it fails"}, "probation": None}
    write_json(tmp_path / f"reports/canary/{'b' * 12}.json", report)
    with pytest.raises(InputError, match=f"{B} was worse on trial: it fails"):
        made(tmp_path, "promote", B)
    made(tmp_path, "refuse", B)
    made(tmp_path, "try", B)
    assert made(tmp_path, "promote", B).champion == B


def test_nothing_takes_the_place_of_a_pinned_champion(tmp_path, known):
    judged(tmp_path, A, None)
    made(tmp_path, "promote", A)
    judged(tmp_path, B, A)
    made(tmp_path, "pin", why="audit until Friday")
    assert pin_reason(tmp_path) == known.read()["pinned"] == "audit until Friday"
    for action in ("promote", "try", "roll_back"):
        with pytest.raises(InputError, match=f"the champion {A} is pinned: audit until Friday"):
            made(tmp_path, action, B if action != "roll_back" else A)
    made(tmp_path, "unpin")
    assert pin_reason(tmp_path) is known.read()["pinned"] is None
    assert made(tmp_path, "promote", B).champion == B


def test_a_second_call_of_a_killed_caller_changes_nothing(tmp_path, known):
    judged(tmp_path, A, None)
    first = made(tmp_path, "promote", A)
    judged(tmp_path, B, A)
    tried = made(tmp_path, "try", B)
    assert made(tmp_path, "try", B) == tried
    promoted = made(tmp_path, "promote", B)
    assert made(tmp_path, "promote", B) == promoted
    back = made(tmp_path, "roll_back", B)
    assert made(tmp_path, "roll_back", B) == back
    assert made(tmp_path, "promote", A) == first
    assert len(read_releases(tmp_path)) == 4


def killed_at(step: int, root: Path, action: str, tag: str) -> None:
    """Begin a release in another process, and kill it before that step."""
    child = os.fork()
    if child == 0:
        steps = actions._steps

        def until_killed(*arguments):
            for number, work in enumerate(steps(*arguments)):
                if number == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield work

        actions._steps = until_killed
        try:
            made(root, action, tag)
        finally:
            os._exit(1)
    _, how = os.waitpid(child, 0)
    assert os.WIFSIGNALED(how), "it was not killed"


@pytest.mark.parametrize("step", range(STEPS))
def test_a_promotion_killed_at_any_step_is_finished_by_the_next(tmp_path, known, step):
    judged(tmp_path, A, None)
    made(tmp_path, "promote", A)
    judged(tmp_path, B, A)
    killed_at(step, tmp_path, "promote", B)
    assert "broken off" in status(tmp_path)
    assert recover(tmp_path, PARAMS).outcome == "done"
    assert agree(tmp_path, known) == (B, None)
    assert served(tmp_path).history == (A,)
    assert [record.tag for record in read_releases(tmp_path)] == [A, B], "once, however often it was noted"
    assert recover(tmp_path, PARAMS) is None


@pytest.mark.parametrize("step", range(STEPS))
def test_a_promotion_whose_verdict_is_gone_is_taken_back(tmp_path, known, step):
    judged(tmp_path, A, None)
    made(tmp_path, "promote", A)
    judged(tmp_path, B, A)
    killed_at(step, tmp_path, "promote", B)
    judged(tmp_path, B, A, passed=False)
    recover(tmp_path, PARAMS)
    assert agree(tmp_path, known) == (A, None)
    assert served(tmp_path) == Aliases(A, None, (), managed=True)
    assert not (tmp_path / INTENT).exists()
    assert [record.tag for record in done_releases(tmp_path)] == [A]


@pytest.mark.parametrize("step", range(STEPS))
def test_a_roll_back_killed_at_any_step_is_finished_by_the_next(tmp_path, known, step):
    judged(tmp_path, A, None)
    made(tmp_path, "promote", A)
    judged(tmp_path, B, A)
    made(tmp_path, "promote", B)
    killed_at(step, tmp_path, "roll_back", B)
    assert made(tmp_path, "roll_back", B).champion == A, "who asks again is told it was done"
    assert agree(tmp_path, known) == (A, None)
    assert [record.action for record in read_releases(tmp_path)] == ["promote", "promote", "roll_back"]


def test_a_registry_that_cannot_be_reached_stops_a_promotion_and_nothing_has_moved(tmp_path, known):
    judged(tmp_path, A, None)
    made(tmp_path, "promote", A)
    judged(tmp_path, B, A)
    known.down = True
    with pytest.raises(InputError, match="cannot be reached"):
        made(tmp_path, "promote", B)
    assert served(tmp_path).champion == A
    known.down = False
    recover(tmp_path, PARAMS)
    assert agree(tmp_path, known) == (A, None)
    assert read_releases(tmp_path)[-1].outcome == "undone"


def test_the_first_promotion_of_all_is_taken_back_to_nothing(tmp_path, known):
    judged(tmp_path, A, None)
    known.down = True
    with pytest.raises(InputError, match="cannot be reached"):
        made(tmp_path, "promote", A)
    known.down = False
    recover(tmp_path, PARAMS)
    assert served(tmp_path) == Aliases(), "not managed: the service may still follow the pipeline"


def test_a_bad_champion_goes_though_the_registry_cannot_be_reached(tmp_path, known):
    judged(tmp_path, A, None)
    made(tmp_path, "promote", A)
    judged(tmp_path, B, A)
    made(tmp_path, "promote", B)
    known.down = True
    assert made(tmp_path, "roll_back", B).champion == A
    assert served(tmp_path).champion == A
    known.down = False
    recover(tmp_path, PARAMS)
    assert agree(tmp_path, known) == (A, None)
    assert read_releases(tmp_path)[-1].action == "roll_back"


def test_releases_side_by_side_take_turns(tmp_path, known):
    judged(tmp_path, A, None)
    made(tmp_path, "promote", A)
    judged(tmp_path, B, A)
    judged(tmp_path, C, A)
    outcomes = []

    def go(tag):
        try:
            outcomes.append(made(tmp_path, "promote", tag).champion)
        except InputError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=go, args=(tag,)) for tag in (B, C)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [said for said in outcomes if said in (B, C)]
    assert any("was judged against" in said for said in outcomes), "the second was judged against the former"
    assert agree(tmp_path, known) == (winner, None)


def test_the_champion_of_before_is_taken_over_and_can_be_gone_back_to(tmp_path, known):
    known.tags = {B}  # nobody recorded the old one
    _write(tmp_path / ALIASES, Aliases(A, Challenger(C, 0.5, "canary")))
    assert adopt(tmp_path, PARAMS).champion == A
    assert served(tmp_path) == Aliases(A, None, (), managed=True), "a trial that nobody judged ends"
    assert known.read()["champion"] is None
    assert adopt(tmp_path, PARAMS) is None
    judged(tmp_path, B, A)
    made(tmp_path, "promote", B)
    assert made(tmp_path, "roll_back").champion == A


def test_a_former_champion_that_was_never_judged_is_not_gone_back_to(tmp_path, known):
    _write(tmp_path / ALIASES, Aliases(A, None, (C,)))
    with pytest.raises(InputError, match=f"no version was champion before {A} that the gate let through"):
        made(tmp_path, "roll_back")


def test_by_hand_nothing_moves_any_more_and_the_service_does_not_follow_the_pipeline(
    tmp_path, known, monkeypatch
):
    judged(tmp_path, A, None)
    made(tmp_path, "promote", A)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"managed by releases[\s\S]*python -m flows.release"):
        set_champion(B)
    write_json(Path("artifacts/export/serving.json"), {"name": "m", "version": "b" * 12})
    assert newest_as_champion(follow_pipeline=True) == A


def test_a_line_cut_off_by_a_kill_is_not_read_and_not_kept(tmp_path, known):
    judged(tmp_path, A, None)
    made(tmp_path, "promote", A)
    with (tmp_path / RELEASES).open("a") as file:
        file.write('{"id": "half')
    assert len(read_releases(tmp_path)) == 1
    made(tmp_path, "pin")
    assert [record.action for record in read_releases(tmp_path)] == ["promote", "pin"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["status"], 0, "champion    nobody"),
        (["promote", A, "--why", "it is better", "--by", "me"], 0, f"promote: {A} is champion"),
        (["promote", B, "--why", "x"], 1, f"error: {B} was never judged"),
        (["rollback", "--why", "x"], 1, "error: no version was champion before None"),
        (["pin", "--why", " "], 1, "error: no reason is given for pin"),
    ],
)
def test_the_command_releases_or_says_why_not(tmp_path, known, monkeypatch, capsys, words, code, said):
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    judged(tmp_path, A, None)
    assert main(words) == code
    output = capsys.readouterr()
    assert said in output.out + output.err


@pytest.mark.slow
def test_mlflow_and_the_service_agree_after_each_release(tmp_path, monkeypatch):
    from flows.registry.tracking import open_tracking

    monkeypatch.setattr("services.versions.__main__.stored", lambda tag: None)
    client = open_tracking(tmp_path, PARAMS.flows.record.tracking_url)
    name = model_versions.registered_name(PARAMS.model_card.name)
    old, new = (f"{PARAMS.model_card.name}:{letter * 12}" for letter in "ab")
    client.create_registered_model(name)
    for tag in (old, new):
        run = client.create_run(client.create_experiment(tag))
        tags = {"tag": tag, "serving_version": tag.rpartition(":")[2]}
        client.create_model_version(name, str(tmp_path), run.info.run_id, tags=tags)
    judged(tmp_path, old, None)
    judged(tmp_path, new, old)
    for action, tag, champion, challenger in (
        ("promote", old, old, None),
        ("try", new, old, new),
        ("promote", new, new, None),
        ("roll_back", None, old, None),
    ):
        made(tmp_path, action, tag)
        assert model_versions.alias_of(tmp_path, PARAMS, "champion") == served(tmp_path).champion == champion
        assert model_versions.alias_of(tmp_path, PARAMS, "challenger") == challenger
    made(tmp_path, "pin", why="audit")
    assert model_versions.pinned(tmp_path, PARAMS) == "audit"
    assert json.loads((tmp_path / RELEASES).read_text().splitlines()[-1])["action"] == "pin"
