"""The fast path of every known family: losses and gradients are those of transformers."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from stages.finetune.fast_lora import slow_down
from stages.finetune.shared_prefix import lay_out
from stages.finetune.speedups import speed_up_training
from tests.stages.families import KNOWN, build_config, build_model
from tests.stages.finetune.test_shared_prefix import (
    EXAMPLES,
    PAD,
    assert_equal_but_for_rounding,
    loss_and_gradient,
    one_by_one,
)


def with_adapter(family, dropout=0.0):
    """Return a random model of a family with a random adapter on every linear layer."""
    settings = {"r": 2, "lora_alpha": 4, "lora_dropout": dropout, "target_modules": "all-linear"}
    tuned = get_peft_model(
        build_model(build_config(family, 50)), LoraConfig(**settings, task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, weights in tuned.named_parameters():
            if "lora_" in name:
                weights.copy_(torch.randn_like(weights) * 0.2)
    return tuned.eval()


@pytest.mark.parametrize("family", KNOWN)
def test_the_fast_path_of_a_family_has_its_losses_and_gradients(family):
    model = with_adapter(family)
    expected = one_by_one(model, EXAMPLES)
    padded = loss_and_gradient(model, lay_out(EXAMPLES, PAD, share_prefix=False))
    share_prefix, modules = speed_up_training(model, EXAMPLES, PAD)
    found = {"attention": share_prefix, "linear layers": modules["lora_linear"], "norms": modules["rms_norm"]}
    assert tuple(part for part, is_fast in found.items() if is_fast) == KNOWN[family].fast
    batch = lay_out(EXAMPLES, PAD, share_prefix)
    assert_equal_but_for_rounding(loss_and_gradient(model, batch), expected, padded)


def test_the_dropout_of_an_adapter_that_has_learned_is_no_change_of_the_loss(caplog):
    model = with_adapter("llama", dropout=0.9)
    for module in model.modules():
        module.training = isinstance(module, torch.nn.Dropout)  # as peft leaves a new adapter
    assert speed_up_training(model, EXAMPLES, PAD)[0] is True
    assert "changes the loss" not in caplog.text


def test_of_a_mixture_of_experts_attention_experts_and_router_are_trained():
    names = [name for name, weights in with_adapter("qwen3-moe").named_parameters() if weights.requires_grad]
    parts = (".self_attn.", ".mlp.experts.", ".mlp.gate.")
    assert {next(part for part in parts if part in name) for name in names} == set(parts)


def test_a_norm_that_learns_or_computes_otherwise_is_left_as_it_is():
    model = with_adapter("llama")
    norms = [m for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"]
    norms[0].weight.requires_grad_()
    norms[1].forward = lambda x: torch.nn.functional.rms_norm(x, x.shape[-1:], norms[1].weight ** 2, 1e-6)
    _, modules = speed_up_training(model, EXAMPLES, PAD)
    assert modules["rms_norm"] == len(norms) - 2
    slow_down(model)
    assert all("forward" not in vars(norm) for norm in norms[2:])
