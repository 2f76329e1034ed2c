import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import psutil
import pytest
import yaml

from flows.registry.model_versions import (
    attach_evidence,
    download_adapter,
    fetch_adapter,
    find_version,
    list_recorded,
    make_registered_name,
    push_aliases,
)
from flows.registry.restore import _make_checkout, restore
from flows.registry.runs import register_candidate, verify_candidate
from flows.registry.tracking import open_tracking
from flows.registry.verify_adapter import compare
from stages.common.artifacts import read_json, write_json
from stages.common.errors import InputError
from stages.common.model.adapter import read_initial_adapter
from stages.common.tag import Tag
from tests.flows.pipeline_output import (
    NAME,
    REPO,
    SQLITE,
    empty_database,
    lock,
    make_output,
    make_recordable,
    params_of,
    registry_of,
    tag_of,
    write,
)

PROMPTS = [[0, 40, 41, 42], [0, 50, 51]]


@pytest.mark.parametrize(
    ("name", "registered"),
    [(NAME, NAME), ("team/model:1", "team-model-1"), ("Modell für zu Hause", "Modell-für-zu-Hause")],
)
def test_a_registered_name_has_neither_slash_nor_colon(name, registered):
    assert make_registered_name(name) == registered


@pytest.fixture
def checkout(tmp_path):
    """Two versions, registered one after the other."""
    first = registered(make_recordable(tmp_path))
    second = registered(make_output(tmp_path, weights=b"learned on"))
    return registry_of(tmp_path), first.tag, second.tag


def registered(root):
    return register_candidate(registry_of(root), params_of(root))


def aliases_of(registry):
    return {info.tag: info.aliases for info in list_recorded(registry)}


@pytest.mark.slow
def test_without_a_registered_version_there_is_nothing_to_list_and_no_alias_to_push(tmp_path):
    make_recordable(tmp_path)
    registry = registry_of(tmp_path)
    assert list_recorded(registry) == []
    push_aliases(registry, {"champion": f"{NAME}:000000000000", "challenger": None})
    assert list_recorded(registry) == []


@pytest.mark.slow
def test_pushed_aliases_point_to_their_versions_and_away_from_the_former_ones(checkout):
    registry, first, second = checkout
    for _ in range(2):
        push_aliases(registry, {"champion": first, "challenger": second})
        assert aliases_of(registry) == {second: ("challenger",), first: ("champion",)}
    push_aliases(registry, {"champion": second, "challenger": None})
    assert aliases_of(registry) == {second: ("champion",), first: ()}
    assert find_version(registry, second).aliases == ("champion",)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tag", [f"{NAME}:000000000000", "another:000000000000", f"{NAME}:latest", "x' or name != 'x:000000000000"]
)
def test_an_alias_of_a_version_that_mlflow_lacks_points_to_none(checkout, tag, caplog):
    registry, first, _ = checkout
    push_aliases(registry, {"champion": first})
    push_aliases(registry, {"champion": tag})
    assert set(aliases_of(registry).values()) == {()}
    assert f"MLflow has no version {tag}" in caplog.text
    with pytest.raises(InputError, match=r"is not in MLflow's registry|is not a valid tag"):
        find_version(registry, tag)


@pytest.mark.slow
def test_an_alias_that_was_moved_on_mlflows_page_is_put_back(checkout):
    registry, first, second = checkout
    client = open_tracking(registry.root, SQLITE)
    foreign = client.create_model_version(NAME, source=str(registry.root))
    client.set_registered_model_alias(NAME, "champion", foreign.version)
    push_aliases(registry, {"champion": first, "challenger": None})
    assert aliases_of(registry) == {second: (), first: ("champion",)}


@pytest.mark.slow
def test_the_next_training_starts_from_the_bytes_of_the_champion(checkout):
    registry, first, second = checkout
    root = registry.root
    write(root / "artifacts/initial_adapter/README.md", "stays")
    for tag, weights in [(second, b"learned on"), (first, b"weights")]:
        fetch_adapter(registry, tag)
        start = read_initial_adapter(root / "artifacts/initial_adapter")
        assert (start.version, start.base_sha256) == (Tag.parse(tag).version, "b" * 64)
        assert (root / "artifacts/initial_adapter/adapter_model.safetensors").read_bytes() == weights
        assert start.read_trained_ids() == {"0011223344556677"}
    assert (root / "artifacts/initial_adapter/README.md").read_text() == "stays"
    assert download_adapter(registry, first, root / "again").is_dir()


@pytest.mark.slow
def test_trained_weights_go_to_the_registry_and_back_and_leave_no_other_adapter(checkout):
    registry, first, _ = checkout
    root = registry.root
    fetch_adapter(registry, first)
    trained, start = root / "artifacts/finetune", root / "artifacts/initial_adapter"
    for path in trained.iterdir():
        path.unlink()
    make_output(root, b"all weights")
    (trained / "adapter_model.safetensors").rename(trained / "replaced_weights.safetensors")
    (trained / "adapter_config.json").unlink()
    write_json(trained / "replaced_config.json", {"method": "full"})
    lock(root)
    fetch_adapter(registry, registered(root).tag)
    names = {path.name for path in start.iterdir()} - {"README.md"}
    assert names == {
        *("replaced_config.json", "replaced_weights.safetensors"),
        *("origin.json", "trained_row_ids.txt"),
    }
    assert (start / "replaced_weights.safetensors").read_bytes() == b"all weights"


@pytest.mark.slow
def test_an_adapter_that_the_registry_has_lost_or_changed_is_not_used(checkout):
    registry, first, second = checkout
    root = registry.root
    fetch_adapter(registry, first)
    kept = root / ".perennial/mlflow-artifacts"
    adapter = kept / find_version(registry, second).run_id / "artifacts/adapter"
    (adapter / "adapter_model.safetensors").write_bytes(b"flipped bits")
    with pytest.raises(InputError, match="has the hash"):
        fetch_adapter(registry, second)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="lacks adapter_model"):
        fetch_adapter(registry, second)
    shutil.rmtree(adapter)
    with pytest.raises(InputError, match=r"the adapter of .* cannot be read"):
        fetch_adapter(registry, second)
    assert read_initial_adapter(root / "artifacts/initial_adapter").version == Tag.parse(first).version


@pytest.mark.slow
def test_a_server_behind_a_url_serves_as_the_file_does(tmp_path, monkeypatch):
    from stages.common.network import free_port

    write(tmp_path / "server.db", empty_database())
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--workers", "1"]
    command += ["--artifacts-destination", str(tmp_path / "served")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    monkeypatch.setenv("PERENNIAL_TRACKING_URL", f"http://127.0.0.1:{port}")
    root = make_output(tmp_path / "checkout")
    registry = registry_of(root)
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: open_tracking(root, registry.tracking_url))
        candidate = registered(root)
        assert registered(root) == candidate
        push_aliases(registry, {"champion": candidate.tag})
        write_json(root / "reports/gate/x.json", {"passed": True})
        attach_evidence(registry, candidate.tag, Path("reports/gate/x.json"), gate="passed")
        (info,) = list_recorded(registry)
        assert (info.aliases, info.gate) == (("champion",), "passed")
        fetch_adapter(registry, candidate.tag)
        assert (root / "artifacts/initial_adapter/adapter_model.safetensors").read_bytes() == b"weights"
        assert not (root / ".perennial/mlflow.db").exists()
    finally:
        server.terminate()
        server.wait(30)
    with pytest.raises(InputError, match=f"does not answer at http://127.0.0.1:{port}"):
        list_recorded(registry)


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
    from stages.common.messages import Message
    from stages.common.records import make_row, write_rows
    from stages.common.task.json_task import JsonTask
    from stages.common.task.kinds import TASK_FILE
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
    write_json(root / TASK_FILE, JsonTask("intent").describe())
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
    with pytest.raises(InputError, match="the logits of 2 of 2 prompts differ"):
        compare(base, trained, off, PROMPTS)

    # What MLflow's own flavour does: names that are not found, so that peft starts over in silence.
    renamed = shutil.copytree(trained, tmp_path / "renamed")
    names = {name.replace("model.layers", "model.other"): tensor for name, tensor in weights.items()}
    save_file(names, renamed / "adapter_model.safetensors")
    with pytest.raises(InputError, match="does not fit the base model: it has nothing for"):
        compare(base, trained, renamed, PROMPTS)

    zero = shutil.copytree(trained, tmp_path / "zero")
    save_file({name: tensor * 0 for name, tensor in weights.items()}, zero / "adapter_model.safetensors")
    with pytest.raises(InputError, match="changes no logit of the base model"):
        compare(base, zero, zero, PROMPTS)


@pytest.mark.slow
def test_a_version_comes_back_as_it_was_trained_and_is_restored_to_the_store(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bento"))
    root = shutil.copytree(tiny, tmp_path / "checkout")
    write(root / ".perennial/mlflow.db", empty_database())
    registry, tag = registry_of(root), tag_of(root)
    candidate = registered(root)
    verify_candidate(registry, candidate)

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
        restore(registry, f"{NAME}:{served['version']}")


def test_a_smaller_model_is_not_restored_from_its_adapter_alone(tmp_path):
    root = make_recordable(tmp_path / "checkout", compression={"variant": "int8", "made_from": "0" * 12})
    registered(root)
    with pytest.raises(InputError, match=r"is a smaller model \(int8\), which its adapter"):
        _make_checkout(registry_of(root), tag_of(root), tmp_path / "restored")


# In a process of its own: BentoML reads where its store is when it is imported.
RESTORED = """
import json, sys
from pathlib import Path
from flows.registry.restore import restore
from flows.registry.tracking import Registry
from services.versions.store import get_version
from stages.common.params.loading import load_params
files = get_version(restore(Registry.of(Path(), load_params()), sys.argv[1]))
print(json.dumps({"about": files.about, "version": files.version}))
"""


EXPORTING = "from pathlib import Path; from flows.registry.restore import _export; _export(Path())"


def test_the_export_of_a_killed_restore_ends(tmp_path):
    os.mkfifo(tmp_path / "params.yaml")  # the export waits for what no one writes
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    with subprocess.Popen([sys.executable, "-c", EXPORTING], cwd=tmp_path, env=environment) as owner:
        export = wait_for(partial(find_child, owner.pid, "stages.export"))
        owner.kill()
    _, alive = psutil.wait_procs([export], timeout=120)
    for process in alive:
        process.kill()
    assert alive == []


def find_child(pid, module):
    """Return the child that runs a module; InputError while there is none."""
    for child in psutil.Process(pid).children():
        if module in child.cmdline():
            return child
    raise InputError("there is no such child", "wait")
