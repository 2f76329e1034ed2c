import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows.registry import model_versions, record
from flows.registry.verify_adapter import compare
from stages.common.adapter import read_initial_adapter
from stages.common.artifacts import read_json, write_json
from stages.common.errors import InputError
from tests.flows.pipeline_output import (
    NAME,
    REPO,
    SQLITE,
    empty_database,
    lock,
    make_output,
    make_recordable,
    params_of,
    tag_of,
    write,
)

PROMPTS = [[0, 40, 41, 42], [0, 50, 51]]


@pytest.mark.parametrize(
    ("name", "registered"),
    [(NAME, NAME), ("team/model:1", "team-model-1"), ("Modell für zu Hause", "Modell-für-zu-Hause")],
)
def test_a_registered_name_has_neither_slash_nor_colon(name, registered):
    assert model_versions.registered_name(name) == registered


@pytest.fixture
def checkout(tmp_path):
    """Two versions, recorded one after the other."""
    first = recorded(make_recordable(tmp_path))
    second = recorded(make_output(tmp_path, weights=b"learned on"))
    return tmp_path, params_of(tmp_path), first.tag, second.tag


def recorded(root):
    return record.record_training(root, params_of(root))


@pytest.mark.slow
def test_without_a_recorded_version_nobody_bears_an_alias(tmp_path):
    make_recordable(tmp_path)
    params = params_of(tmp_path)
    assert model_versions.alias_of(tmp_path, params, "champion") is None
    assert model_versions.champion_since(tmp_path, params) is None
    assert model_versions.pinned(tmp_path, params) is None
    assert model_versions.versions_table(tmp_path, params) == []
    model_versions.set_alias(tmp_path, params, "challenger", None)
    with pytest.raises(InputError, match="no version of"):
        model_versions.set_pinned(tmp_path, params, "why")


@pytest.mark.slow
def test_an_alias_moves_to_a_version_and_away_from_the_former(checkout):
    root, params, first, second = checkout
    model_versions.set_alias(root, params, "champion", first)
    model_versions.set_alias(root, params, "challenger", second)
    assert model_versions.alias_of(root, params, "champion") == first
    assert model_versions.alias_of(root, params, "challenger") == second
    model_versions.set_alias(root, params, "champion", second)
    model_versions.set_alias(root, params, "challenger", None)
    assert model_versions.alias_of(root, params, "champion") == second
    assert model_versions.alias_of(root, params, "challenger") is None
    assert [(info.tag, info.aliases) for info in model_versions.versions_table(root, params)] == [
        (second, ("champion",)),
        (first, ()),
    ]
    assert [info.tag for info in model_versions.candidates(root, params)] == [first]


@pytest.mark.slow
def test_naming_the_champion_again_does_not_make_it_younger_and_going_back_does(checkout):
    root, params, first, second = checkout
    model_versions.set_alias(root, params, "champion", first)
    began = model_versions.champion_since(root, params)
    model_versions.set_alias(root, params, "champion", first)
    assert model_versions.champion_since(root, params) == began
    model_versions.set_alias(root, params, "champion", second)
    second_began = model_versions.champion_since(root, params)
    model_versions.set_alias(root, params, "champion", first)
    assert began < second_began < model_versions.champion_since(root, params)


@pytest.mark.slow
def test_an_alias_is_never_set_to_what_was_not_recorded(checkout):
    root, params, first, _ = checkout
    model_versions.set_alias(root, params, "champion", first)
    for tag, why in [
        (f"{NAME}:000000000000", "is not in MLflow's registry"),
        ("another:000000000000", "is not in MLflow's registry"),
        (f"{NAME}:latest", "is no tag"),
        ("x' or name != 'x:000000000000", "is no tag"),
    ]:
        with pytest.raises(InputError, match=why):
            model_versions.set_alias(root, params, "champion", tag)
    assert model_versions.alias_of(root, params, "champion") == first


@pytest.mark.slow
def test_an_alias_that_was_given_by_hand_to_something_else_is_said(checkout):
    from flows.registry.tracking import open_tracking

    root, params, *_ = checkout
    client = open_tracking(root, SQLITE)
    foreign = client.create_model_version(NAME, source=str(root))
    client.set_registered_model_alias(NAME, "champion", foreign.version)
    with pytest.raises(InputError, match="which nobody recorded"):
        model_versions.alias_of(root, params, "champion")
    assert len(model_versions.versions_table(root, params)) == 2


@pytest.mark.slow
def test_a_pin_has_its_reason_until_it_is_taken_off(checkout):
    root, params, *_ = checkout
    model_versions.set_pinned(root, params, "an audit is running")
    assert model_versions.pinned(root, params) == "an audit is running"
    model_versions.set_pinned(root, params, None)
    model_versions.set_pinned(root, params, None)
    assert model_versions.pinned(root, params) is None


@pytest.mark.slow
def test_the_next_training_starts_from_the_bytes_of_the_champion(checkout):
    root, params, first, second = checkout
    write(root / "artifacts/initial_adapter/README.md", "stays")
    for tag, weights in [(second, b"learned on"), (first, b"weights")]:
        model_versions.fetch_adapter(root, params, tag)
        start = read_initial_adapter(root / "artifacts/initial_adapter")
        assert (start.version, start.base_sha256) == (tag.rpartition(":")[2], "b" * 64)
        assert (root / "artifacts/initial_adapter/adapter_model.safetensors").read_bytes() == weights
        assert start.read_trained_ids() == {"0011223344556677"}
    assert (root / "artifacts/initial_adapter/README.md").read_text() == "stays"
    assert model_versions.download_adapter(root, params, first, root / "again").is_dir()


@pytest.mark.slow
def test_an_adapter_that_the_registry_has_lost_or_changed_is_not_used(checkout):
    root, params, first, second = checkout
    model_versions.fetch_adapter(root, params, first)
    kept = root / ".perennial/mlflow-artifacts"
    adapter = kept / model_versions.find_version(root, params, second).run_id / "artifacts/adapter"
    (adapter / "adapter_model.safetensors").write_bytes(b"flipped bits")
    with pytest.raises(InputError, match="has the hash"):
        model_versions.fetch_adapter(root, params, second)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="lacks adapter_model"):
        model_versions.fetch_adapter(root, params, second)
    shutil.rmtree(adapter)
    with pytest.raises(InputError, match=r"the adapter of .* cannot be read"):
        model_versions.fetch_adapter(root, params, second)
    assert read_initial_adapter(root / "artifacts/initial_adapter").version == first.rpartition(":")[2]


@pytest.mark.slow
def test_a_server_behind_a_url_serves_as_the_file_does(tmp_path, monkeypatch):
    from flows.registry.tracking import open_tracking
    from stages.common.network import free_port

    write(tmp_path / "server.db", empty_database())
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--workers", "1"]
    command += ["--artifacts-destination", str(tmp_path / "served")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    monkeypatch.setenv("PERENNIAL_TRACKING_URL", f"http://127.0.0.1:{port}")
    root = make_output(tmp_path / "checkout")
    params = params_of(root)
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: open_tracking(root, params.flows.record.tracking_url))
        candidate = recorded(root)
        assert recorded(root) == candidate
        model_versions.set_alias(root, params, "champion", candidate.tag)
        write_json(root / "reports/gate/x.json", {"passed": True})
        model_versions.evidence(root, params, candidate.tag, Path("reports/gate/x.json"), gate="passed")
        (info,) = model_versions.versions_table(root, params)
        assert (info.aliases, info.gate) == (("champion",), "passed")
        model_versions.fetch_adapter(root, params, candidate.tag)
        assert (root / "artifacts/initial_adapter/adapter_model.safetensors").read_bytes() == b"weights"
        assert not (root / ".perennial/mlflow.db").exists()
    finally:
        server.terminate()
        server.wait(30)
    with pytest.raises(InputError, match=f"does not answer at http://127.0.0.1:{port}"):
        model_versions.alias_of(root, params, "champion")


def wait_for(ready, seconds=60):
    import time

    until = time.monotonic() + seconds
    while True:
        try:
            return ready()
        except InputError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A finished pipeline of a model of a few thousand weights, exported by its stage."""
    from stages.common.records import Message, make_row, write_rows
    from stages.export import __main__ as export
    from tests.stages.export.test_export import save_adapter
    from tests.tiny import save_model

    root = tmp_path_factory.mktemp("tiny")
    make_output(root)
    save_model(root / "artifacts/fetch_base")
    shutil.rmtree(root / "artifacts/finetune")
    save_adapter(root / "artifacts/fetch_base", root / "artifacts/finetune")
    (root / "artifacts/finetune/README.md").unlink(missing_ok=True)
    (root / "artifacts/split").mkdir()
    answers = [("turn it on", '{"intent":"On"}'), ("turn it off", '{"intent":"Off"}')]
    rows = [
        make_row([Message("user", question), Message("assistant", answer)], "toy", "cc0-1.0")
        for question, answer in answers
    ]
    write_rows(root / "artifacts/split/train.parquet", rows)
    write_json(root / "reports/fetch_base/metrics.json", {"name": "tiny", "revision": "1", "sha256": "00"})
    values = yaml.safe_load((REPO / "params.yaml").read_text())
    values["export"]["gguf"] = False
    (root / "params.yaml").write_text(yaml.safe_dump(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        export.main()
    lock(root)
    return root


@pytest.mark.slow
def test_adapters_that_compute_the_same_are_equal_and_a_forgotten_one_is_found(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    base, trained = tiny / "artifacts/fetch_base", tiny / "artifacts/finetune"
    assert compare(base, trained, shutil.copytree(trained, tmp_path / "same"), PROMPTS) > 0

    weights = load_file(trained / "adapter_model.safetensors")
    off = shutil.copytree(trained, tmp_path / "off")
    name = next(name for name in weights if "lora_B" in name)
    save_file({**weights, name: weights[name] * 1.01}, off / "adapter_model.safetensors")
    with pytest.raises(InputError, match="of 2 prompts 2 have other logits"):
        compare(base, trained, off, PROMPTS)

    # What MLflow's own flavour does: names that are not found, so that loading begins anew in silence.
    renamed = shutil.copytree(trained, tmp_path / "renamed")
    names = {name.replace("model.layers", "model.other"): tensor for name, tensor in weights.items()}
    save_file(names, renamed / "adapter_model.safetensors")
    with pytest.raises(InputError, match="have other logits"):
        compare(base, trained, renamed, PROMPTS)
    with pytest.raises(InputError, match="not found on loading"):
        compare(base, renamed, renamed, PROMPTS)


@pytest.mark.slow
def test_a_version_comes_back_as_it_was_trained_and_is_restored_to_the_store(tiny, tmp_path, monkeypatch):
    from flows.registry.restore import restore

    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bento"))
    root = shutil.copytree(tiny, tmp_path / "checkout")
    write(root / ".perennial/mlflow.db", empty_database())
    params, tag = params_of(root), tag_of(root)
    candidate = recorded(root)
    record.check_reload(candidate, root, params)

    served = read_json(root / "artifacts/export/serving.json")
    shutil.rmtree(root / "artifacts/export")
    shutil.rmtree(root / "artifacts/finetune")
    monkeypatch.chdir(root)
    done = subprocess.run(
        [sys.executable, "-c", RESTORED, tag],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"about": served, "version": served["version"]}
    assert not (root / "artifacts/export").exists()

    write_json(root / "reports/fetch_base/metrics.json", {"name": "tiny", "revision": "1", "sha256": "11"})
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "empty"))
    with pytest.raises(InputError, match="belongs to the base model 00"):
        restore(root, params, f"{NAME}:{served['version']}")


# In a process of its own: BentoML reads where its store is when it is imported.
RESTORED = """
import json, sys
from pathlib import Path
from flows.registry.restore import restore
from services.versions.__main__ import stored
from stages.common.params.loading import load_params
files = stored(restore(Path(), load_params(), sys.argv[1]))
print(json.dumps({"about": files.about, "version": files.version}))
"""
