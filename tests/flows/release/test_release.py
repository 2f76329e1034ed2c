"""Releases: what moves, what is rejected, and that a kill at any step leaves one consistent state.

MLflow takes seconds to start: all but the slow tests mirror the aliases into a JSON file in its place.
"""

import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from flows.gate.verdict import Criterion, GateVerdict, hash_files, write_verdict
from flows.registry.model_versions import list_recorded, make_registered_name
from flows.registry.tracking import Registry
from flows.release import actions
from flows.release.__main__ import format_status, main
from flows.release.actions import Order, promote_first, release, settle
from flows.retrain import progress, steps
from services.versions import store
from services.versions.aliases import ALIASES, Challenger, read_aliases
from services.versions.releases import RELEASES, read_releases
from stages.common.artifacts import read_json, write_json, write_text
from stages.common.errors import InputError
from stages.common.params.loading import load_params
from stages.common.tag import Tag
from tests.services.serving import ROOT

PARAMS = load_params(ROOT / "params.yaml")
A, B, C = (f"m:{letter * 12}" for letter in "abc")
STORED_AT = 1000.0
# What a release does after it was allowed; a kill can come before each, and after the last.
STEPS = ("write_aliases", "append_release", "push_aliases")


class Mirror:
    """MLflow's aliases, in a file."""

    def __init__(self, path):
        self.path = path
        self.down = False

    def read(self):
        known = {"champion": None, "challenger": None}
        return known | (read_json(self.path) if self.path.exists() else {})

    def push_aliases(self, registry, aliases):
        if self.down:
            raise InputError("MLflow at sqlite:///x cannot be reached", "start it")
        write_json(self.path, aliases)


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """Return MLflow's side of a checkout at `tmp_path`, whose model store has every version."""
    found = Mirror(tmp_path / "mlflow.json")
    monkeypatch.setattr(store, "get_version", lambda tag: None)
    monkeypatch.setattr(store, "read_stored_at", lambda tag: STORED_AT)
    monkeypatch.setattr(actions, "push_aliases", found.push_aliases)
    return found


def judged(root: Path, tag: str, champion: str | None, *, passed: bool = True) -> None:
    """Write a verdict of the gate with a file of evidence."""
    evidence = root / f".perennial/gate/{Tag.parse(tag).version}/answers.json"
    write_text(evidence, f"answers of {tag}")
    criterion = Criterion("old_test", "not forgotten", 0.0, -0.1, 0.1, -0.005, passed, "it forgot 3 points")
    files = hash_files(root, [evidence])
    write_verdict(root, GateVerdict(tag, champion, 1.0, passed, "champion", (criterion,), files, {}))


def registry_of(root):
    return Registry(root, "m", PARAMS.flows.tracking.tracking_url, "perennial")


def made(root, action, tag=None, reason="because", **more):
    share = PARAMS.flows.retrain.canary.share
    return release(registry_of(root), Order(action, tag, "tester", reason, share, **more))


def promoted(root, *tags):
    """Promote one version after the other."""
    for tag in tags:
        judged(root, tag, served(root).champion)
        made(root, "promote", tag)


def served(root):
    return read_aliases(root / ALIASES)


def agreed(root, mirror):
    """Return champion and challenger; the file, its journal and MLflow must agree on them."""
    aliases, mirrored = served(root), mirror.read()
    challenger = aliases.challenger.tag if aliases.challenger else None
    assert (aliases.champion, challenger) == (mirrored["champion"], mirrored["challenger"])
    last = read_releases(root)[-1]
    assert last == aliases.release
    assert (last.champion, last.challenger) == (aliases.champion, challenger)
    return aliases.champion, challenger


def actions_of(root):
    return [(one.action, one.tag) for one in read_releases(root)]


def test_a_version_is_promoted_goes_into_canary_replaces_the_champion_and_is_rolled_back(tmp_path, mirror):
    judged(tmp_path, A, None)
    first = made(tmp_path, "promote", A)
    assert agreed(tmp_path, mirror) == (A, None)
    assert (served(tmp_path).champion_since, served(tmp_path).replaced) == (first.at, None)
    judged(tmp_path, B, A)
    canary = made(tmp_path, "canary", B)
    share = PARAMS.flows.retrain.canary.share
    assert served(tmp_path).challenger == Challenger(B, share, "canary", canary.at)
    assert served(tmp_path).champion_since == first.at
    assert agreed(tmp_path, mirror) == (A, B)
    second = made(tmp_path, "promote", B)
    assert (second.former, served(tmp_path).history) == (A, (A,))
    assert (served(tmp_path).champion_since, served(tmp_path).replaced) == (second.at, A)
    assert agreed(tmp_path, mirror) == (B, None)
    back = made(tmp_path, "rollback", B, reason="it fails")
    assert (back.champion, back.former, back.tag, back.reason) == (A, B, B, "it fails")
    assert (served(tmp_path).champion_since, served(tmp_path).replaced) == (back.at, None)
    assert agreed(tmp_path, mirror) == (A, None)
    assert actions_of(tmp_path) == [("promote", A), ("canary", B), ("promote", B), ("rollback", B)]
    with pytest.raises(InputError, match=f"no former champion to replace {A}"):
        made(tmp_path, "rollback")


def test_a_canary_can_be_rejected_and_the_champion_stays(tmp_path, mirror):
    promoted(tmp_path, A)
    judged(tmp_path, B, A)
    made(tmp_path, "canary", B)
    made(tmp_path, "reject", B)
    assert agreed(tmp_path, mirror) == (A, None)
    with pytest.raises(InputError, match=f"{A} is the champion"):
        made(tmp_path, "reject", A)


@pytest.mark.parametrize(
    ("by_hand", "outcome", "message"),
    [
        ("reject", "rejected", "its canary was ended (reject by tester): too slow"),
        ("promote", "promoted", f"{B} took over from {A}"),
    ],
)
def test_a_retraining_whose_canary_was_ended_by_hand_ends_accordingly(
    tmp_path, mirror, by_hand, outcome, message
):
    promoted(tmp_path, A)
    judged(tmp_path, B, A)
    made(tmp_path, "canary", B)
    with progress.lock(tmp_path):
        begun = progress.start(tmp_path, "drift", None, champion=A, since=0.0)
        killed = progress.save_state(
            tmp_path, replace(begun, step="canary", candidate=B, canary_since=begun.until)
        )
        made(tmp_path, by_hand, B, reason="too slow")
        made(tmp_path, "pin", reason="an audit")  # a later release did not end the canary
        ended = steps.run_canary(tmp_path, PARAMS, killed)
    assert (ended.outcome, ended.summary) == (outcome, message)
    assert progress.read_history(tmp_path) == [ended]
    assert progress.read_state(tmp_path) is None


@pytest.mark.parametrize("action", ["promote", "canary"])
def test_what_the_gate_did_not_pass_moves_nothing(tmp_path, mirror, action):
    promoted(tmp_path, A)
    with pytest.raises(InputError, match=f"the gate has not judged {B}"):
        made(tmp_path, action, B)
    judged(tmp_path, B, A, passed=False)
    with pytest.raises(InputError, match=r"the gate rejected m:b+\n  old_test: it forgot 3 points"):
        made(tmp_path, action, B)
    judged(tmp_path, B, C)
    with pytest.raises(InputError, match=f"{B} was judged against {C}, and the champion is {A}"):
        made(tmp_path, action, B)
    judged(tmp_path, B, A)
    write_text(tmp_path / f".perennial/gate/{'b' * 12}/answers.json", "other answers")
    with pytest.raises(
        InputError, match=r"evidence of the verdict on m:b+ has changed since: .*answers.json"
    ):
        made(tmp_path, action, B)
    with pytest.raises(InputError, match=f"{A} is the champion: {B} would not be the first"):
        made(tmp_path, "promote", B, first=True)
    assert agreed(tmp_path, mirror) == (A, None)
    assert len(read_releases(tmp_path)) == 1


def test_a_verdict_that_was_edited_is_not_accepted(tmp_path, mirror):
    judged(tmp_path, A, None, passed=False)
    path = tmp_path / Tag.parse(A).report("gate")
    write_json(path, read_json(path) | {"passed": True})
    with pytest.raises(InputError, match="passed is True, which contradicts its criteria"):
        made(tmp_path, "promote", A)


def test_what_was_worse_in_its_canary_is_not_promoted_until_another_canary(tmp_path, mirror):
    promoted(tmp_path, A)
    judged(tmp_path, B, A)
    begun = made(tmp_path, "canary", B)
    report = {"tag": B, "canary": {"state": "bad", "since": begun.at, "summary": "it fails"}, "bake": None}
    write_json(tmp_path / Tag.parse(B).report("canary"), report)
    with pytest.raises(InputError, match=f"{B} was worse in its canary: it fails"):
        made(tmp_path, "promote", B)
    made(tmp_path, "reject", B)
    with pytest.raises(InputError, match=f"{B} was worse in its canary: it fails"):
        made(tmp_path, "promote", B)
    made(tmp_path, "canary", B)
    assert made(tmp_path, "promote", B).champion == B


def test_nothing_replaces_a_pinned_champion(tmp_path, mirror):
    promoted(tmp_path, A)
    judged(tmp_path, B, A)
    made(tmp_path, "pin", reason="audit until Friday")
    assert served(tmp_path).pinned == "audit until Friday"
    for action in ("promote", "canary", "rollback"):
        with pytest.raises(InputError, match=f"the champion {A} is pinned: audit until Friday"):
            made(tmp_path, action, B if action != "rollback" else A)
    made(tmp_path, "unpin")
    assert served(tmp_path).pinned is None
    assert made(tmp_path, "promote", B).champion == B


def test_a_second_call_of_a_killed_caller_changes_nothing(tmp_path, mirror):
    judged(tmp_path, A, None)
    first = made(tmp_path, "promote", A)
    judged(tmp_path, B, A)
    canary = made(tmp_path, "canary", B)
    assert made(tmp_path, "canary", B) == canary
    second = made(tmp_path, "promote", B)
    assert made(tmp_path, "promote", B) == second
    back = made(tmp_path, "rollback", B)
    assert made(tmp_path, "rollback", B) == back
    assert made(tmp_path, "promote", A) == first
    assert len(read_releases(tmp_path)) == 4


def killed_before(step: str | None, root: Path, action: str, tag: str) -> None:
    """Make a release in another process, and kill it before a step; None: after the last."""
    before = served(root).release
    child = os.fork()
    if child == 0:

        def die(*_):
            # The journal is completed from the last release first: that is not the step.
            if step != "append_release" or served(root).release != before:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            if step is not None:
                setattr(actions, step, die)
            made(root, action, tag)
            die()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it was not killed"


@pytest.mark.parametrize("step", [*STEPS, None])
@pytest.mark.parametrize("repair", ["the same call", "the next watch", "another release"])
def test_after_a_kill_at_any_step_the_next_call_leaves_one_consistent_state(tmp_path, mirror, step, repair):
    promoted(tmp_path, A)
    judged(tmp_path, B, A)
    killed_before(step, tmp_path, "promote", B)
    happened = step != "write_aliases"
    assert served(tmp_path).champion == (B if happened else A), "the rename is the release"
    if repair == "the same call":
        assert made(tmp_path, "promote", B).champion == B
        happened = True
    elif repair == "the next watch":
        settle(registry_of(tmp_path))
    else:
        made(tmp_path, "pin")
    assert agreed(tmp_path, mirror) == (B if happened else A, None)
    assert served(tmp_path).history == ((A,) if happened else ())
    promotions = [("promote", A), *([("promote", B)] if happened else [])]
    assert [one for one in actions_of(tmp_path) if one[0] == "promote"] == promotions, "once each"


@pytest.mark.parametrize("step", [*STEPS, None])
def test_a_killed_promotion_whose_verdict_is_gone_is_not_repeated(tmp_path, mirror, step):
    promoted(tmp_path, A)
    judged(tmp_path, B, A)
    killed_before(step, tmp_path, "promote", B)
    judged(tmp_path, B, A, passed=False)
    if step == "write_aliases":
        with pytest.raises(InputError, match=f"the gate rejected {B}"):
            made(tmp_path, "promote", B)
        settle(registry_of(tmp_path))
        assert agreed(tmp_path, mirror) == (A, None)
    else:  # it was the champion before the verdict went
        made(tmp_path, "promote", B)
        assert agreed(tmp_path, mirror) == (B, None)


@pytest.mark.parametrize("step", [*STEPS, None])
def test_a_rollback_killed_at_any_step_is_done_once_by_the_next_call(tmp_path, mirror, step):
    promoted(tmp_path, A, B)
    killed_before(step, tmp_path, "rollback", B)
    assert made(tmp_path, "rollback", B).champion == A
    assert agreed(tmp_path, mirror) == (A, None)
    assert actions_of(tmp_path) == [("promote", A), ("promote", B), ("rollback", B)]


@pytest.mark.parametrize(("action", "champion"), [("promote", C), ("rollback", A)])
def test_aliases_move_while_mlflow_is_down_and_it_follows_once_it_is_up(
    tmp_path, mirror, action, champion, caplog
):
    promoted(tmp_path, A, B)
    judged(tmp_path, C, B)
    mirror.down = True
    made(tmp_path, action, C if action == "promote" else B)
    assert served(tmp_path).champion == champion
    assert mirror.read()["champion"] == B
    settle(registry_of(tmp_path))
    assert "MLflow's aliases are out of date" in caplog.text
    mirror.down = False
    settle(registry_of(tmp_path))
    assert agreed(tmp_path, mirror) == (champion, None)


def test_releases_side_by_side_take_turns(tmp_path, mirror):
    promoted(tmp_path, A)
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
    (winner,) = [one for one in outcomes if one in (B, C)]
    assert any("was judged against" in one for one in outcomes), "the second was judged against the former"
    assert agreed(tmp_path, mirror) == (winner, None)


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    """Return a function that lets the pipeline make a version."""

    def make(tag):
        name, version = tag.split(":")
        write_json(tmp_path / "artifacts/export/serving.json", {"name": name, "version": version})

    monkeypatch.setattr(store, "add_pipeline_output", store.read_pipeline_tag)
    return make


def test_the_first_model_is_promoted_as_it_was_served_and_the_gate_decides_from_then_on(
    tmp_path, mirror, pipeline
):
    pipeline(A)
    promote_first(registry_of(tmp_path), True, "retrain")
    assert (served(tmp_path).champion, served(tmp_path).champion_since) == (A, STORED_AT)
    assert agreed(tmp_path, mirror) == (A, None)
    pipeline(B)
    promote_first(registry_of(tmp_path), True, "retrain")
    assert store.find_served("m", True, tmp_path) == served(tmp_path).champion == A
    promoted(tmp_path, B)
    assert made(tmp_path, "rollback").champion == A


@pytest.mark.parametrize("step", ["gather", "train", "record", "gate"])
def test_a_killed_first_retraining_promotes_its_candidate_only_through_the_gate(
    tmp_path, mirror, pipeline, step
):
    with progress.lock(tmp_path):
        begun = steps.resume_or_start(tmp_path, PARAMS, "the first", None, None)
        progress.save_state(tmp_path, replace(begun, step=step))
        pipeline(A)
        again = steps.resume_or_start(tmp_path, PARAMS, "once more", None, None)
    assert (again.id, again.champion) == (begun.id, None)
    assert served(tmp_path).champion is None


def test_a_line_cut_off_by_a_kill_is_not_read_and_not_kept(tmp_path, mirror):
    promoted(tmp_path, A)
    with (tmp_path / RELEASES).open("a") as file:
        file.write('{"id": "half')
    assert len(read_releases(tmp_path)) == 1
    made(tmp_path, "pin")
    assert [one.action for one in read_releases(tmp_path)] == ["promote", "pin"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["status"], 0, "champion    none"),
        (["promote", A, "--reason", "it is better", "--by", "me"], 0, f"promote: the champion is {A}"),
        (["promote", B, "--reason", "x"], 1, f"error: the gate has not judged {B}"),
        (["promote", B, "--first", "--reason", "x"], 0, f"promote: the champion is {B}"),
        (["canary", A, "--reason", "x"], 1, "error: there is no champion to compare with"),
        (["rollback", "--reason", "x"], 1, "error: there is no former champion to replace None"),
        (["pin", "--reason", " "], 1, "error: pin needs a reason"),
    ],
)
def test_the_command_releases_or_names_the_problem(
    tmp_path, mirror, monkeypatch, capsys, words, code, message
):
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    judged(tmp_path, A, None)
    assert main(words) == code
    output = capsys.readouterr()
    assert message in output.out + output.err


def test_the_status_has_the_aliases_their_times_and_the_last_releases(tmp_path, mirror):
    promoted(tmp_path, A)
    judged(tmp_path, B, A)
    made(tmp_path, "canary", B)
    made(tmp_path, "pin", reason="audit")
    lines = format_status(tmp_path).splitlines()
    assert lines[0].startswith(f"champion    {A} since 20")
    assert lines[1].startswith(f"challenger  {B} since 20") and lines[1].endswith(
        "(canary, 20% of the users)"
    )
    assert lines[2] == "pinned      audit"
    assert [line.split("  ")[1] for line in lines[3:]] == [
        f"pin {A} by tester: audit",
        f"canary {B} by tester: because",
        f"promote {A} by tester: because",
    ]


def test_a_canary_by_hand_can_have_its_own_share_or_be_a_shadow(tmp_path, mirror, monkeypatch, capsys):
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    promoted(tmp_path, A)
    judged(tmp_path, B, A)
    assert main(["canary", B, "--share", "0.5", "--mode", "shadow", "--reason", "a look"]) == 0
    assert replace(served(tmp_path).challenger, since=None) == Challenger(B, 0.5, "shadow")
    with pytest.raises(SystemExit):
        main(["canary", B, "--share", "1.5", "--reason", "x"])
    assert "1.5 is not between 0 and 1" in capsys.readouterr().err


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Return a registry in MLflow that has two versions, and their tags."""
    from flows.registry.tracking import open_tracking

    monkeypatch.setattr(store, "get_version", lambda tag: None)
    registry = registry_of(tmp_path)
    client = open_tracking(tmp_path, registry.tracking_url)
    name = make_registered_name("m")
    client.create_registered_model(name)
    for tag in (A, B):
        run = client.create_run(client.create_experiment(tag))
        tags = {"tag": tag, "serving_version": Tag.parse(tag).version}
        client.create_model_version(name, str(tmp_path), run.info.run_id, tags=tags)
    judged(tmp_path, A, None)
    judged(tmp_path, B, A)
    return registry


def mlflow_aliases(registry):
    return {alias: info.tag for info in list_recorded(registry) for alias in info.aliases}


@pytest.mark.slow
def test_mlflow_mirrors_the_aliases_after_each_release(tmp_path, recorded):
    for action, tag, aliases in (
        ("promote", A, {"champion": A}),
        ("canary", B, {"champion": A, "challenger": B}),
        ("promote", B, {"champion": B}),
        ("rollback", None, {"champion": A}),
    ):
        made(tmp_path, action, tag)
        assert mlflow_aliases(recorded) == aliases
        assert served(tmp_path).champion == aliases["champion"]
    made(tmp_path, "pin", reason="audit")
    assert json.loads((tmp_path / RELEASES).read_text().splitlines()[-1])["action"] == "pin"


@pytest.mark.slow
def test_killed_between_the_file_and_mlflow_the_next_watch_brings_mlflow_up_to_date(tmp_path, recorded):
    made(tmp_path, "promote", A)
    killed_before("push_aliases", tmp_path, "promote", B)
    assert served(tmp_path).champion == B
    assert mlflow_aliases(recorded) == {"champion": A}
    settle(recorded)
    assert mlflow_aliases(recorded) == {"champion": B}


@pytest.mark.slow
def test_a_move_while_mlflows_database_is_away_is_mirrored_once_it_is_back(tmp_path, recorded):
    made(tmp_path, "promote", A)
    database, away = tmp_path / ".perennial/mlflow.db", tmp_path / "away.db"
    database.rename(away)
    database.mkdir()  # no database can be opened there
    made(tmp_path, "promote", B)
    assert served(tmp_path).champion == B
    database.rmdir()
    away.rename(database)
    assert mlflow_aliases(recorded) == {"champion": A}
    settle(recorded)
    assert mlflow_aliases(recorded) == {"champion": B}


@pytest.mark.slow
def test_a_version_that_mlflow_does_not_have_leaves_its_alias_without_one(tmp_path, recorded):
    made(tmp_path, "promote", A)
    promoted(tmp_path, C)
    assert served(tmp_path).champion == C
    assert mlflow_aliases(recorded) == {}
