"""LoRA on a base model in 4 bits, by the real bitsandbytes on a CPU."""

import json
from pathlib import Path

import pytest
import torch

from stages.common.errors import InputError
from stages.common.model import nf4
from stages.common.model.loading import load_base, load_tuned
from stages.common.model.nf4 import NF4_BYTES, check_nf4, count_numbers
from stages.finetune.__main__ import main
from stages.finetune.adapter import build_model
from stages.finetune.progress.flops import count_work
from stages.preflight.finetune_checks import count_training
from tests.stages.finetune.project import (
    SHOWING_IMPORTS,
    change_finetune,
    evidence,
    finish_with_imports,
    make_recipe,
    put_own_adapter,
    start_stage,
)
from tests.tiny import make_model, save_model

CPU = torch.device("cpu")


def test_what_is_missing_is_named_before_a_model_is_loaded(monkeypatch):
    config = make_model().config
    monkeypatch.setattr(nf4, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="bitsandbytes is not installed") as error:
        check_nf4(config, "cpu")
    assert "perennial[qlora]" in error.value.fix
    monkeypatch.setattr(nf4, "find_spec", lambda name: object())
    with pytest.raises(InputError, match="trains on mps"):
        check_nf4(config, "mps")
    config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(InputError, match="are quantized already"):
        check_nf4(config, "cuda")


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_layers_are_in_four_bits_and_the_matrices_in_float32(tmp_path, bitsandbytes, dtype):
    base = save_model(tmp_path)
    model = build_model(base, make_recipe(method="qlora", dtype=dtype))
    linear = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(linear) == 14 and {m.weight.quant_state.quant_type for m in linear} == {"nf4"}
    numbers = sum(count_numbers(m.weight) for m in linear)
    assert numbers == 2 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32)
    assert sum(m.weight.numel() * m.weight.element_size() for m in linear) == numbers / 2
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    plain = build_model(base, make_recipe(method="lora", dtype=dtype))
    assert count_work(model) == count_work(plain)


def test_a_training_in_four_bits_ends_in_an_adapter_of_lora_for_the_whole_base_model(project, bitsandbytes):
    change_finetune(project, method="qlora")
    main()
    metrics = evidence(project)
    assert metrics["method"] == "qlora" and metrics["fast_modules"]["lora_linear"] == 0
    curve = (project / "reports/finetune/loss.csv").read_text().splitlines()
    losses = [float(line.split(",")[1]) for line in curve[1:]]
    assert losses[-1] < losses[0]
    base, adapter = project / "artifacts/fetch_base", project / "artifacts/finetune"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["r"] == 4
    before, tuned = load_base(base, torch.float32, CPU), load_tuned(base, adapter, torch.float32, CPU)
    difference = {
        name: (weights - dict(before.named_parameters())[name]).abs().max()
        for name, weights in tuned.named_parameters()
    }
    assert {name for name, most in difference.items() if most} == {
        name for name in difference if name.endswith("_proj.weight")
    }
    kept = (adapter / "adapter_model.safetensors").read_bytes()
    main()
    assert (adapter / "adapter_model.safetensors").read_bytes() == kept
    put_own_adapter(project)
    for method in ("lora", "qlora"):
        change_finetune(project, method=method)
        main()
        assert evidence(project)["started_from"] == "0123456789ab"


@pytest.mark.slow
def test_the_process_of_such_a_training_finds_bitsandbytes(project, bitsandbytes):
    change_finetune(project, method="qlora")
    imported = finish_with_imports(start_stage(project, SHOWING_IMPORTS, OMP_NUM_THREADS="1"))
    assert "bitsandbytes" in imported and evidence(project)["method"] == "qlora"


def test_gradients_are_the_same_after_the_model_was_asked(tmp_path, bitsandbytes):
    model = build_model(
        save_model(tmp_path, hidden_size=64, intermediate_size=64), make_recipe(method="qlora")
    )

    def read_gradients():
        model.zero_grad()
        model.train()
        model(torch.tensor([[4, 5, 6]])).logits.logsumexp(-1).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    before = read_gradients()
    model.eval()
    with torch.no_grad():
        model(torch.tensor([[4, 5, 6]]))
    after = read_gradients()
    assert any(one.any() for one in before)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_preflight_counts_what_is_in_four_bits(tmp_path, bitsandbytes):
    from stages.common.params.loading import load_params

    finetune = load_params(Path(__file__).parents[3] / "params.yaml").finetune
    settings = finetune.model_copy(update={"method": "qlora", "rank": 4})
    training = count_training(make_model().config, settings)
    assert training.quantized_parameters == 2 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32)
    assert training.trained_parameters == sum(
        p.numel()
        for p in build_model(save_model(tmp_path), make_recipe(method="qlora")).parameters()
        if p.requires_grad
    )
    assert 0.515 < NF4_BYTES < 0.517
