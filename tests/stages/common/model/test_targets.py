"""Which modules get an adapter."""

import re

import pytest
import torch

from stages.common.errors import InputError
from stages.common.model.loading import load_base, load_tuned
from stages.common.model.targets import check_experts, check_targets
from tests.stages.families import build_config, build_model
from tests.stages.finetune.test_fast_lora import lora
from tests.tiny import make_model, save_model

IDS = torch.tensor([[5, 6, 7]])


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["model.embed_tokens"], r".*(v_proj|lm_head)"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_embedding_that_is_the_output_layer_too_gets_no_adapter(targets, device):
    with torch.device(device):
        model = make_model()
    with pytest.raises(InputError, match="the embedding of the base model is its output layer, too") as error:
        check_targets(model, targets)
    assert re.search(r"has (lm_head|model.embed_tokens), ", error.value.what)
    assert "finetune.trained_modules: [model.embed_tokens]" in error.value.fix
    check_targets(make_model(tie_word_embeddings=False), targets)
    check_targets(model, ["q_proj", "v_proj"])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([], "finetune.target_modules is empty"),
        (
            ["q_proj", "mlp"],
            r"has model.layers.0.mlp, which has no matrix of its own; its linear modules are ",
        ),
        (r".*norm", r"has model.layers.0.input_layernorm, which has no matrix"),
    ],
)
def test_modules_without_a_matrix_of_their_own_are_refused(targets, message):
    with pytest.raises(InputError, match=message) as error:
        check_targets(make_model(), targets)
    assert "set it to all-linear" in error.value.fix


def test_experts_get_no_adapter_with_dropout_or_of_dora():
    mixture = build_model(build_config("qwen3-moe", 50))
    for method, dropout, wanted in (("lora", 0.1, "dropout: 0.1"), ("dora", 0.0, "method: dora")):
        with pytest.raises(InputError, match=f"finetune.{wanted} is not possible for experts") as error:
            check_experts(mixture, "all-linear", method, dropout)
        assert "finetune.dropout: 0" in error.value.fix
        check_experts(mixture, ["q_proj"], method, dropout)
        check_experts(make_model(), "all-linear", method, dropout)
    check_experts(mixture, "all-linear", "rslora", 0.0)


def test_what_an_adapter_of_it_has_learned_would_not_be_what_is_merged(tmp_path):
    """Which is why it is refused."""
    cpu = torch.device("cpu")
    base = save_model(tmp_path / "base")
    tuned = lora(load_base(base, torch.float32, cpu), target_modules=["lm_head"], init_lora_weights=False)
    tuned.save_pretrained(tmp_path / "adapter")
    merged = load_tuned(base, tmp_path / "adapter", torch.float32, cpu)
    assert not torch.allclose(merged(IDS).logits, tuned.eval()(IDS).logits, atol=1e-3)
