"""GPTQ: rounded weights whose outputs on training rows change less than by rounding each by itself."""

import copy

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from stages.common.errors import InputError
from stages.common.gguf.quantization import find_scales, quantize_values, round_to_scales
from stages.compress.gptq import fit_weights, round_weights
from tests.stages.families import build_config, build_model
from tests.tiny import make_model


def round_alone(weights):
    groups = weights.numpy().reshape(-1, 32)
    scales = find_scales(groups)
    return torch.from_numpy((round_to_scales(groups, scales) * scales).reshape(weights.shape))


def draw_layer():
    torch.manual_seed(0)
    inputs = torch.randn(512, 8) @ torch.randn(8, 96) + 0.3 * torch.randn(512, 96)  # they vary together
    return torch.randn(24, 96), inputs


def test_outputs_change_less_than_by_rounding_each_weight_by_itself():
    weights, inputs = draw_layer()
    fitted = round_weights(weights, inputs.T @ inputs)
    errors = [float((inputs @ (one - weights).T).norm()) for one in (fitted, round_alone(weights))]
    assert errors[0] < 0.6 * errors[1]


def test_the_file_holds_the_very_numbers():
    weights, inputs = draw_layer()
    fitted = round_weights(weights, inputs.T @ inputs).numpy()
    kind = GGMLQuantizationType.Q4_0
    assert np.array_equal(dequantize(quantize_values(fitted, kind), kind), fitted)


def test_inputs_that_never_occur_keep_rounded_weights():
    weights, inputs = draw_layer()
    inputs[:, 40:64] = 0
    fitted = round_weights(weights, inputs.T @ inputs)
    assert torch.isfinite(fitted).all()
    assert (fitted[:, 40:64] - weights[:, 40:64]).abs().mean() < 0.2


def test_weights_that_are_not_finite_are_refused_by_name():
    weights, inputs = draw_layer()
    weights[3, 5] = float("nan")
    with pytest.raises(InputError, match=r"layers\.1\.mlp has weights or inputs that are not finite"):
        round_weights(weights, inputs.T @ inputs, "layers.1.mlp")


@pytest.mark.parametrize("family", ["llama", "gemma3-text", "phi3", "qwen3"])
def test_whole_models_of_other_families_are_rounded_block_by_block(family):
    """Each block runs with its own arguments: Gemma 3 has other masks and rotations in some."""
    torch.manual_seed(1)
    model = (
        make_model(hidden_size=64, intermediate_size=96, initializer_range=0.2)
        if family == "llama"
        else build_model(build_config(family, 260))
    )
    rows = [[2 + (7 * n * n + k) % 94 for n in range(40)] for k in range(6)]
    whole, alone = copy.deepcopy(model), copy.deepcopy(model)
    done = []
    fit_weights(model, rows, lambda number, total: done.append((number, total)))
    assert done == [(n + 1, model.config.num_hidden_layers) for n in range(model.config.num_hidden_layers)]
    changed = 0
    with torch.no_grad():
        for name, weights in alone.named_parameters():
            ours = model.get_parameter(name)
            if torch.equal(ours, whole.get_parameter(name)):
                continue
            assert name.split(".")[-2].endswith("_proj")
            assert np.array_equal(round_alone(ours).numpy(), ours.numpy())
            weights.copy_(round_alone(weights))
            changed += 1
        assert changed >= 4 * model.config.num_hidden_layers
        ids = torch.tensor(rows)
        logits = [one(ids).logits for one in (whole, model, alone)]
    assert (logits[1] - logits[0]).norm() < (logits[2] - logits[0]).norm()
