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


def choose(wanted="auto", gguf=True, base=True, folder=None):
    made = tiny()
    return choose_kind(
        wanted,
        folder or made.folder,
        made.folder / "model.gguf" if gguf else None,
        made.folder if base else None,
    )


def test_a_cpu_gets_openvino_and_else_transformers(machine):
    machine()
    assert choose() == "openvino"
    assert choose(gguf=False) == "transformers"
    machine(wheels=())
    assert choose() == "transformers"


def test_a_gpu_gets_vllm_and_else_transformers(machine):
    machine(gpus=1, wheels=("openvino_genai", "vllm"))
    assert choose() == "vllm"
    assert choose(base=False) == "openvino"
    machine(gpus=1)
    assert choose() == "transformers"


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


@pytest.mark.parametrize("kind", ["paged", "openvino", "transformers"])
def test_the_engine_is_loaded_with_the_settings(kind):
    made = tiny()
    files = SimpleNamespace(
        name="tiny",
        version="0" * 12,
        tokenizer=made.folder,
        gguf=made.folder / "model.gguf",
        base=made.folder,
        adapter=None,
    )
    settings = SimpleNamespace(
        kind=kind, gpus=0, threads=1, context_tokens=64, max_running=3, max_waiting=2, kv_cache_mib=16
    )
    engine = load_engine(files, made.tokenizer, settings)
    assert (engine.name, engine.context_tokens, engine.max_running) == (kind, 64, 3)
    engine.close()
