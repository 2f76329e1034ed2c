import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from stages.common.errors import InputError
from stages.common.model.loading import load_base, load_tokenizer, load_tuned, pick_device, pick_dtype
from tests.tiny import make_model, save_model

CPU = torch.device("cpu")


def test_a_model_folder_comes_back_as_it_was_saved(tmp_path):
    folder = save_model(tmp_path / "base")
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(load_base(folder, torch.float32, CPU)(ids).logits, make_model()(ids).logits)
    assert load_tokenizer(folder).pad_token_id is not None


def test_the_tuned_model_is_the_base_with_its_adapter_and_nothing_else(tmp_path):
    folder = save_model(tmp_path / "base")
    adapted = get_peft_model(
        make_model(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        expected = adapted.eval()(ids).logits
        tuned = load_tuned(folder, tmp_path / "adapter", torch.float32, CPU)(ids).logits
    torch.testing.assert_close(tuned, expected)
    assert not torch.allclose(tuned, make_model()(ids).logits)


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ({"hidden_size": 32}, "size mismatch for .*layers.0.self_attn.q_proj.lora_A"),
        ({"num_hidden_layers": 3}, "it has nothing for .*layers.2.self_attn.q_proj.lora_A"),
        ({"num_hidden_layers": 1}, "the base model has no place for .*layers.1.mlp.down_proj.lora_A"),
        ({"model_type": "gpt2"}, "Target modules .* not found"),
    ],
)
def test_an_adapter_of_another_base_is_refused(tmp_path, shape, why):
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    get_peft_model(make_model(), lora).save_pretrained(tmp_path / "adapter")
    other = save_model(tmp_path / "other", **shape)
    with pytest.raises(InputError, match=f"adapter does not fit the base model: [\\s\\S]*{why}") as error:
        load_tuned(other, tmp_path / "adapter", torch.float32, CPU)
    assert "fetch the base model that it was trained on" in error.value.fix


def test_an_adapter_that_is_cut_is_named(tmp_path):
    base = save_model(tmp_path / "base")
    for name, config in {
        "lora": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        "prompt_tuning": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }.items():
        get_peft_model(make_model(), config).save_pretrained(tmp_path / name)
        path = tmp_path / name / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(InputError, match=rf"{name}/adapter_model.safetensors cannot be read") as error:
            load_tuned(base, tmp_path / name, torch.float32, CPU)
        assert "dvc repro finetune" in error.value.fix


def test_a_folder_without_a_model_names_the_stage_that_makes_it(tmp_path):
    with pytest.raises(InputError, match="dvc repro fetch_base"):
        load_tokenizer(tmp_path)
    folder = save_model(tmp_path / "base")
    with pytest.raises(InputError, match="dvc repro finetune"):
        load_tuned(folder, tmp_path / "none", torch.float32, CPU)


def test_the_precision_can_be_named_and_is_native_otherwise():
    assert pick_dtype(CPU, "float32") is torch.float32
    assert pick_dtype(CPU, "bfloat16") is torch.bfloat16
    abilities = torch.cpu.get_capabilities()
    native = abilities.get("avx512_bf16") or abilities.get("amx_bf16")
    assert pick_dtype(CPU) is (torch.bfloat16 if native else torch.float32)


def test_the_gpu_of_a_mac_is_taken_where_there_is_no_other(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for available, device in ((True, "mps"), (False, "cpu")):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda available=available: available)
        assert pick_device() == torch.device(device)


def test_cuda_comes_before_metal(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device() == torch.device("cuda")


def test_metal_computes_in_float32_by_default():
    assert pick_dtype(torch.device("mps")) is torch.float32
    assert pick_dtype(torch.device("mps"), "bfloat16") is torch.bfloat16
