import json
from types import SimpleNamespace

import pytest

from services.engines import select
from services.engines.select import check_gpus, choose_kind, load_engine
from stages.common.errors import InputError
from tests.services.engines.makers import tiny


@pytest.fixture
def machine(monkeypatch):
    """Set what is seen of the machine: GPUs, and which wheels are there."""

    def set_machine(gpus=0, wheels=("openvino_genai",)):
        monkeypatch.setattr(select, "_count_gpus", lambda: gpus)
        monkeypatch.setattr(select, "find_spec", lambda name: name if name in wheels else None)

    return set_machine


def choose(wanted="auto", gguf=True, base=True, folder=None, gpus=0, adapter=None):
    made = tiny()
    return choose_kind(
        wanted,
        folder or made.folder,
        made.folder / "model.gguf" if gguf else None,
        made.folder if base else None,
        gpus,
        adapter,
    )


def test_a_cpu_gets_openvino_and_else_transformers(machine):
    machine()
    assert choose() == "openvino"
    assert choose(gguf=False) == "transformers"
    machine(wheels=())
    assert choose() == "transformers"


def test_a_gpu_that_is_reserved_gets_vllm_and_else_transformers(machine, caplog):
    machine(gpus=1, wheels=("openvino_genai", "vllm"))
    assert choose(gpus=1) == "vllm"
    assert choose(gpus=1, base=False) == "openvino"
    machine(gpus=1)
    assert choose(gpus=1) == "transformers"
    assert "slower than vLLM" in caplog.text


@pytest.mark.parametrize(
    ("name", "config", "method"),
    [
        ("adapter_config.json", {"use_dora": True}, "dora"),
        ("replaced_config.json", {"method": "full"}, "full"),
    ],
)
def test_what_vllm_cannot_load_is_served_by_transformers_or_refused(
    machine, monkeypatch, tmp_path, name, config, method
):
    machine(gpus=1, wheels=("openvino_genai", "vllm"))
    (tmp_path / name).write_text(json.dumps(config))
    assert choose(gpus=1, adapter=tmp_path) == "transformers"
    with pytest.raises(InputError, match=rf"lora, rslora, .*, and this is one of {method}"):
        choose("vllm", gpus=1, adapter=tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / "adapter_config.json").write_text('{"use_rslora": true}')
    assert choose(gpus=1, adapter=tmp_path) == "vllm"
    monkeypatch.setattr("services.engines.support.WITHOUT_VLLM_ADAPTERS", ("llama",))
    assert choose(gpus=1, adapter=tmp_path) == "transformers"
    with pytest.raises(InputError, match="vLLM loads no adapters of the architecture llama"):
        choose("vllm", gpus=1, adapter=tmp_path)


def test_a_gpu_that_is_not_reserved_is_left_alone(machine, caplog):
    machine(gpus=1, wheels=("openvino_genai", "vllm"))
    caplog.set_level("INFO")
    assert choose() == "openvino"
    assert "services.engine.gpus is 0" in caplog.text
    assert choose(gguf=False) == "transformers"


def test_gpus_are_counted_without_initialising_cuda(monkeypatch):
    """A process forked after `is_available` cannot use CUDA: vLLM's would not start."""
    import torch

    def initialise():
        raise AssertionError("this initialises CUDA")

    for name in ("is_available", "init", "_lazy_init", "current_device", "mem_get_info"):
        monkeypatch.setattr(torch.cuda, name, initialise)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_gpus(SimpleNamespace(gpus=2))


def test_an_architecture_that_openvino_does_not_read_gets_transformers(machine, tmp_path):
    machine()
    (tmp_path / "config.json").write_text('{"model_type": "gemma3_text"}')
    assert choose(folder=tmp_path) == "transformers"
    with pytest.raises(InputError, match="gemma3_text"):
        choose("openvino", folder=tmp_path)


@pytest.mark.parametrize(
    ("wanted", "settings", "files", "reason"),
    [
        ("vllm", {}, {}, "torch sees no GPU"),
        ("vllm", {"gpus": 1}, {}, "vLLM is not installed"),
        ("openvino", {"wheels": ()}, {}, "OpenVINO is not installed"),
        ("openvino", {}, {"gguf": False}, "no GGUF"),
        ("transformers", {}, {"base": False}, "safetensors are missing"),
    ],
)
def test_an_engine_that_cannot_run_is_refused_with_the_reason(machine, wanted, settings, files, reason):
    machine(**settings)
    with pytest.raises(InputError, match=reason):
        choose(wanted, **files)


def test_files_for_no_engine_are_refused_with_all_reasons(machine):
    machine()
    with pytest.raises(InputError, match=r"openvino: .*transformers: "):
        choose(gguf=False, base=False)


def test_gpus_that_are_not_there_are_refused(machine):
    machine(gpus=1)
    check_gpus(SimpleNamespace(gpus=1))
    machine()
    check_gpus(SimpleNamespace(gpus=0))
    with pytest.raises(InputError, match=r"services.engine.gpus is 1, and torch sees no GPUs"):
        check_gpus(SimpleNamespace(gpus=1))


@pytest.fixture
def files():
    made = tiny()
    return SimpleNamespace(
        name="tiny",
        version="0" * 12,
        tokenizer=made.folder,
        gguf=made.folder / "model.gguf",
        base=made.folder,
        adapter=None,
    )


def settings(kind, gpus=0):
    return SimpleNamespace(
        kind=kind,
        gpus=gpus,
        gpu_memory=0.5,
        threads=1,
        context_tokens=64,
        max_running=3,
        max_waiting=2,
        kv_cache_mib=16,
    )


@pytest.mark.parametrize("kind", ["paged", "openvino", "transformers"])
def test_the_engine_is_loaded_with_the_settings(files, kind):
    engine = load_engine(files, tiny().tokenizer, settings(kind))
    assert (engine.name, engine.context_tokens, engine.max_running) == (kind, 64, 3)
    engine.close()


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (1, "auto")])
def test_transformers_takes_the_gpu_only_if_it_is_reserved(machine, monkeypatch, files, gpus, device):
    machine(gpus=1)
    monkeypatch.setattr("services.engines.transformers.TransformersEngine", lambda *_, **made: made)
    assert load_engine(files, None, settings("transformers", gpus))["device"] == device


def test_vllm_gets_its_share_of_the_memory_and_the_time_to_finish(machine, monkeypatch, files):
    machine(gpus=1, wheels=("vllm",))
    monkeypatch.setattr("services.engines.vllm.VllmEngine", lambda *_, **made: made)
    made = load_engine(files, None, settings("vllm", 1), drain_s=120.0)
    assert (made["gpu_memory"], made["drain_s"]) == (0.5, 120.0)
