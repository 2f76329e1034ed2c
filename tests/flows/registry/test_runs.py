import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flows.registry.model_versions import attach_evidence, find_version, list_recorded
from flows.registry.output import (
    flatten_params,
    make_key,
    read_curve,
    read_git_tags,
    read_metrics,
    read_output,
)
from flows.registry.runs import format_note, register_candidate
from flows.registry.tracking import open_tracking
from stages.common.artifacts import write_json
from stages.common.errors import InputError
from stages.common.params.loading import Params
from stages.common.repository.dvc_lock import compute_dvc_hash
from stages.common.tag import Tag
from tests.flows.pipeline_output import (
    NAME,
    REPO,
    SQLITE,
    lock,
    make_output,
    make_recordable,
    params_of,
    registry_of,
    tag_of,
    write,
)


def git(root, *arguments):
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    done = subprocess.run(
        ["git", "-C", root, *identity, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def dvc(root, *arguments):
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(root / ".dvc/site")}
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_metrics_are_numbers_by_their_stage_and_the_keys_on_the_way(tmp_path):
    metrics = read_metrics(make_output(tmp_path, exact_match=0.5))
    assert metrics["evaluate/tuned.exact_match.value"] == 0.5
    assert metrics["evaluate/passed"] == 1.0
    assert metrics["finetune/train_loss"] == 0.018370554198050715
    assert not [name for name in metrics if "dtype" in name or "confusions" in name or name.endswith(".low")]


def test_a_metrics_file_that_dvc_does_not_know_is_excluded(tmp_path):
    make_output(tmp_path)
    write_json(tmp_path / "reports/elsewhere/metrics.json", {"n": 1})
    assert {name.partition("/")[0] for name in read_metrics(tmp_path)} == {"evaluate", "finetune"}


@pytest.mark.parametrize("name", ["evaluate/tuned.exact_match.value", "collect/by_source.a/2026.10", "s/ü"])
def test_a_name_that_mlflow_takes_is_kept(name):
    assert make_key(name) == name


def test_names_that_mlflow_refuses_are_changed_and_stay_different():
    names = [
        "s/a(b)",
        "s/a[b]",
        "s/a_b_",
        "s/../x",
        "s//x",
        "s/./x",
        "s/",
        "s/" + "n" * 300,
        "s/" + "n" * 301,
    ]
    keys = [make_key(name) for name in names]
    assert len(set(keys)) == len(names)
    assert all(len(key) <= 250 and "//" not in key and ".." not in key.split("/") for key in keys)


def test_every_parameter_has_its_dotted_name_and_no_password():
    params = params_of(REPO)
    found = flatten_params(params)
    assert found["finetune.rank"] == "16"
    assert found["collect.sources.0.kind"] == "home_intents"
    assert json.loads(found["monitoring.trigger.drift_types"]) == ["input", "output", "quality"]
    assert found["flows.retrain.gate.max_old_loss"] == "0.005"
    sections = {field.alias or name for name, field in Params.model_fields.items()}
    assert {name.partition(".")[0] for name in found} == sections

    services = params.services.model_copy(
        update={"events": params.services.events.model_copy(update={"url": "postgresql://me:secret@host/db"})}
    )
    masked = flatten_params(params.model_copy(update={"services": services}))
    assert masked["services.events.url"] == "postgresql://…@host/db"


def test_the_curve_has_every_step_and_leaves_gaps_out(tmp_path):
    write(tmp_path / "reports/finetune/loss.csv", "step,loss,learning_rate\n1,3.5,\n10,1.25,1e-3\n")
    assert list(read_curve(tmp_path)) == [
        ("curve/loss", 1, 3.5),
        ("curve/loss", 10, 1.25),
        ("curve/learning_rate", 10, 0.001),
    ]
    write(tmp_path / "reports/finetune/validation.csv", "step,loss,exact_match\n5,2.5,0.25\n")
    assert list(read_curve(tmp_path))[-2:] == [
        ("validation/loss", 5, 2.5),
        ("validation/exact_match", 5, 0.25),
    ]
    assert list(read_curve(tmp_path / "nothing")) == []


def test_the_revision_is_clean_until_a_tracked_file_changes(tmp_path):
    write(tmp_path / "dvc.lock", "a")
    write(tmp_path / "params.yaml", "a")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    write(tmp_path / "dvc.lock", "b")
    write(tmp_path / "untracked", "b")
    clean = read_git_tags(tmp_path)
    assert clean["git.revision"] == git(tmp_path, "rev-parse", "HEAD")
    assert clean["git.dirty"] == "false"
    write(tmp_path / "params.yaml", "b")
    dirty = read_git_tags(tmp_path)
    assert (dirty["git.dirty"], dirty["git.changed"]) == ("true", "params.yaml")


def test_without_git_the_revision_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert read_git_tags(tmp_path) == {"git.revision": "none", "git.dirty": "unknown"}


def test_an_output_names_the_hashes_that_dvc_recorded(tmp_path):
    make_output(tmp_path)
    write(tmp_path / "artifacts/split/train.parquet", "rows")
    split = {"outs": [{"path": "artifacts/split", "hash": "md5", "md5": "recorded.dir"}]}
    lock(tmp_path, split=split)
    tags = read_output(tmp_path, "hand").tags
    assert tags["dvc.adapter"] == compute_dvc_hash(tmp_path / "artifacts/finetune")
    assert tags["dvc.data"] == "recorded.dir"
    assert tags["dvc.agrees"] == "true"


def test_files_that_dvc_did_not_see_are_recorded_as_such(tmp_path):
    make_output(tmp_path)
    write(tmp_path / "artifacts/finetune/adapter_config.json", '{"r": 8}')
    tags = read_output(tmp_path, "hand").tags
    assert tags["dvc.agrees"] == "false"
    assert tags["dvc.adapter"] == compute_dvc_hash(tmp_path / "artifacts/finetune")


def test_one_output_has_one_key_and_another_run_of_dvc_another(tmp_path):
    make_output(tmp_path)
    first = read_output(tmp_path, "hand").key
    assert read_output(tmp_path, "20261121T101500-500").key == first
    lock(tmp_path, evaluate={"params": {"params.yaml": {"evaluate": {"seed": 8}}}})
    assert read_output(tmp_path, "hand").key != first


def test_the_export_of_another_adapter_is_not_recorded(tmp_path):
    make_output(tmp_path)
    write(tmp_path / "artifacts/finetune/adapter_model.safetensors", b"trained since")
    with pytest.raises(InputError, match="was made from the adapter") as caught:
        read_output(tmp_path, "hand")
    assert "dvc repro" in caught.value.fix


def test_a_pipeline_that_has_not_ended_is_not_recorded(tmp_path):
    make_output(tmp_path)
    shutil.rmtree(tmp_path / "artifacts/export")
    with pytest.raises(InputError, match=r"artifacts/export/serving\.json does not exist") as caught:
        read_output(tmp_path, "hand")
    assert "dvc repro export" in caught.value.fix


def test_a_run_says_which_version_it_learned_on_from(tmp_path):
    make_output(tmp_path)
    assert read_output(tmp_path, "hand").tags["started_from"] == "base"
    write_json(tmp_path / "reports/finetune/metrics.json", {"started_from": "0123456789ab"})
    assert read_output(tmp_path, "hand").tags["started_from"] == "0123456789ab"


def test_the_note_of_a_run_says_where_it_came_from_and_what_was_learned(tmp_path):
    make_output(tmp_path)
    output = read_output(tmp_path, "20261121T101500-500")
    assert format_note(tmp_path, output) == (
        f"{tag_of(tmp_path)}: a new adapter; started by 20261121T101500-500."
    )
    figures = {"base": {"exact_match": {"value": 0.0}}, "tuned": {"exact_match": {"value": 0.86}}}
    write_json(tmp_path / "reports/evaluate/metrics.json", figures)
    assert format_note(tmp_path, output).splitlines()[2:] == [
        "| metric | base | tuned | difference |",
        "| --- | --- | --- | --- |",
        "| exact match | 0.00 | 0.86 | +0.86 |",
    ]


@pytest.mark.slow
def test_a_run_holds_everything_that_made_the_model(tmp_path):
    make_recordable(tmp_path)
    candidate = register_candidate(registry_of(tmp_path), params_of(tmp_path), "20261121T101500-500")
    assert (candidate.tag, candidate.model_version) == (tag_of(tmp_path), "1")
    client = open_tracking(tmp_path, SQLITE)
    run = client.get_run(candidate.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == flatten_params(params_of(tmp_path))
    assert run.data.tags["trigger"] == "20261121T101500-500"
    assert run.data.tags["champion"] == "none"
    assert run.data.tags["model_version"] == "1"
    points = client.get_metric_history(candidate.run_id, "curve/loss")
    assert [(point.step, point.value) for point in points] == [(1, 3.5), (2, 1.25)]
    kept = tmp_path / ".perennial/mlflow-artifacts" / candidate.run_id / "artifacts"
    files = {path.relative_to(kept).as_posix() for path in kept.rglob("*") if path.is_file()}
    assert files == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/trained_row_ids.txt",
        "card/README.md",
        "dvc.lock",
        "dvc.yaml",
        "params.yaml",
        "plots/evaluate/comparison.svg",
        "plots/finetune/loss.svg",
        "reports/evaluate/metrics.json",
        "reports/finetune/loss.csv",
        "reports/finetune/metrics.json",
        "serving.json",
    }
    (info,) = list_recorded(registry_of(tmp_path))
    assert (info.tag, info.gate, info.run_id, info.aliases) == (candidate.tag, "none", candidate.run_id, ())
    assert info.headline == {"exact_match": 0.86, "valid_output": 1.0}
    assert info.tags["base_sha256"] == "b" * 64


@pytest.mark.slow
def test_recorded_again_it_is_the_same_run_and_a_new_run_of_one_version_keeps_the_version(tmp_path):
    make_recordable(tmp_path)
    first = register_candidate(registry_of(tmp_path), params_of(tmp_path))
    assert register_candidate(registry_of(tmp_path), params_of(tmp_path), "schedule") == first
    lock(tmp_path, evaluate={"params": {"params.yaml": {"evaluate": {"seed": 8}}}})
    judged_anew = register_candidate(registry_of(tmp_path), params_of(tmp_path))
    assert judged_anew.run_id != first.run_id
    assert judged_anew.model_version == first.model_version
    make_output(tmp_path, weights=b"others")
    assert register_candidate(registry_of(tmp_path), params_of(tmp_path)).model_version == "2"


@pytest.mark.slow
def test_mlflow_and_dvc_say_the_same_of_every_metric_and_of_what_changed(tmp_path):
    make_recordable(tmp_path, exact_match=0.75)
    git(tmp_path, "init", "-q")
    dvc(tmp_path, "init", "-q")
    write(tmp_path / ".gitignore", "/artifacts/\n/.perennial/\n")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    client = open_tracking(tmp_path, SQLITE)
    before = client.get_run(
        register_candidate(registry_of(tmp_path), params_of(tmp_path)).run_id
    ).data.metrics

    make_output(tmp_path, weights=b"learned on", exact_match=0.875)
    after = client.get_run(register_candidate(registry_of(tmp_path), params_of(tmp_path)).run_id).data.metrics
    shown = json.loads(dvc(tmp_path, "metrics", "show", "--json"))[""]["data"]
    expected = {
        make_key(f"{Path(path).parent.name}/{name}"): value
        for path, file in shown.items()
        for name, value in flat(file["data"])
    }
    assert len(expected) == 8
    assert {name: after[name] for name in after if not name.startswith("curve/")} == expected
    changes = json.loads(dvc(tmp_path, "metrics", "diff", "--json"))
    assert changes == {
        "reports/evaluate/metrics.json": {
            "tuned.exact_match.value": {"old": 0.75, "new": 0.875, "diff": 0.125}
        }
    }
    assert {name: after[name] - before[name] for name in after if after[name] != before[name]} == {
        "evaluate/tuned.exact_match.value": 0.125
    }


def flat(values, name=""):
    for key, value in values.items():
        inside = f"{name}.{key}" if name else key
        if isinstance(value, dict):
            yield from flat(value, inside)
        elif not isinstance(value, str):
            yield inside, value


KILLED = """
import os, signal, sys
from pathlib import Path
import mlflow
from flows.registry.runs import register_candidate
from flows.registry.tracking import Registry
from stages.common.params.loading import load_params
what, when = sys.argv[1], int(sys.argv[2])
original = getattr(mlflow.MlflowClient, what)
def dying(*arguments, **named):
    global when
    when -= 1
    if when < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **named)
setattr(mlflow.MlflowClient, what, dying)
register_candidate(Registry.of(Path(), load_params()), load_params())
"""


def start(root, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(REPO), "MLFLOW_DISABLE_TELEMETRY": "true"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_record_that_was_killed_goes_on_and_is_one_run_with_one_version(tmp_path):
    make_recordable(tmp_path)
    points = [("log_artifact", 5), ("create_model_version", 0), ("set_terminated", 0)]
    for what, when in points:
        process = start(tmp_path, "-c", KILLED, what, str(when))
        process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL
    candidate = register_candidate(registry_of(tmp_path), params_of(tmp_path))
    client = open_tracking(tmp_path, SQLITE)
    experiment = client.get_experiment_by_name("perennial")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.status) == (candidate.run_id, "FINISHED")
    assert len(client.get_metric_history(run.info.run_id, "curve/loss")) == 2
    assert [info.number for info in list_recorded(registry_of(tmp_path))] == [1]


@pytest.mark.slow
def test_two_that_record_at_once_into_a_new_database_make_one_run(tmp_path):
    make_output(tmp_path)
    both = [start(tmp_path, "-c", KILLED, "set_terminated", "9") for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    client = open_tracking(tmp_path, SQLITE)
    experiment = client.get_experiment_by_name("perennial")
    assert len(client.search_runs([experiment.experiment_id])) == 1
    assert [info.number for info in list_recorded(registry_of(tmp_path))] == [1]


@pytest.mark.slow
def test_an_experiment_deleted_by_hand_is_an_error(tmp_path):
    make_recordable(tmp_path)
    client = open_tracking(tmp_path, SQLITE)
    client.delete_experiment(client.create_experiment("perennial"))
    with pytest.raises(InputError, match="was deleted in MLflow"):
        register_candidate(registry_of(tmp_path), params_of(tmp_path))


@pytest.mark.slow
def test_evidence_is_attached_to_the_run_under_its_path_below_reports(tmp_path):
    make_recordable(tmp_path)
    registry = registry_of(tmp_path)
    candidate = register_candidate(registry, params_of(tmp_path))
    version = Tag.parse(candidate.tag).version
    write_json(tmp_path / f"reports/gate/{version}.json", {"passed": False})
    write(tmp_path / "reports/watch/20261121T101500-500/verdict.json", "{}")
    for _ in range(2):
        paths = Path(f"reports/gate/{version}.json"), Path("reports/watch/20261121T101500-500")
        attach_evidence(registry, candidate.tag, *paths, gate="rejected")
    assert find_version(registry, candidate.tag).gate == "rejected"
    folder = tmp_path / ".perennial/mlflow-artifacts" / candidate.run_id / "artifacts/evidence"
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.json"))
    assert found == [f"gate/{version}.json", "watch/20261121T101500-500/verdict.json"]
    with pytest.raises(InputError, match="does not exist"):
        attach_evidence(registry, candidate.tag, Path("reports/canary/none.json"), gate="passed")
    assert find_version(registry, candidate.tag).gate == "rejected"
    assert NAME in candidate.tag
