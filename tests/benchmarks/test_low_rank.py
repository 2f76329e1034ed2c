"""The benchmark of low rank: the nearest factors, the size of the rank, and a whole run with a tiny model."""

import json

import pytest
import torch

from benchmarks import low_rank
from tests.tiny import make_model


def multiply(factors):
    return factors[0] @ factors[1]


def test_the_factors_are_the_nearest_of_their_rank():
    torch.manual_seed(0)
    weights = torch.randn(24, 16)
    values = torch.linalg.svdvals(weights)
    for rank in (1, 5, 16):
        left, right = low_rank.approximate(weights, None, rank)
        assert (left.shape, right.shape) == ((24, rank), (rank, 16))
        assert float((left @ right - weights).norm()) == pytest.approx(float(values[rank:].norm()), abs=1e-4)


def test_weighted_factors_change_the_outputs_on_such_inputs_least():
    torch.manual_seed(1)
    weights = torch.randn(24, 16)
    inputs = torch.randn(200, 16) @ torch.diag(torch.linspace(0.01, 3, 16)) @ torch.randn(16, 16)
    moments = inputs.T @ inputs
    outputs = inputs @ weights.T
    plain, weighted, best = (
        float((inputs @ found.T - outputs).norm())
        for found in (
            multiply(low_rank.approximate(weights, None, 6)),
            multiply(low_rank.approximate(weights, moments, 6)),
            # Eckart and Young: the outputs themselves, cut to this rank.
            torch.linalg.lstsq(inputs, multiply(low_rank.approximate(outputs, None, 6))).solution.T,
        )
    )
    assert weighted < 0.8 * plain and weighted == pytest.approx(best, rel=0.01)


def test_moments_that_rounding_made_indefinite_still_weight_the_factors():
    torch.manual_seed(2)
    moments = torch.diag(torch.cat([torch.full((15,), 1.0), torch.tensor([-0.005])]))
    left, right = low_rank.approximate(torch.randn(24, 16), moments, 16)
    assert torch.isfinite(left).all() and torch.isfinite(right).all()
    with pytest.raises(ArithmeticError, match="moments of 16 inputs"):
        low_rank.approximate(torch.randn(24, 16), -moments, 16)


def test_a_rank_takes_at_most_its_share_of_the_weights():
    for outputs, inputs, share in ((576, 576, 0.5), (1536, 576, 0.9), (192, 576, 0.75)):
        rank = low_rank.find_rank(outputs, inputs, share)
        size = outputs * inputs
        assert rank * (outputs + inputs) <= share * size < (rank + 1) * (outputs + inputs)
    assert low_rank.find_rank(2, 2, 0.1) == 1


def test_channels_are_left_out_up_to_the_size_of_the_factors():
    model = make_model(intermediate_size=96)
    sizes = {name: layer.weight.numel() for name, layer in low_rank.list_layers(model).items()}
    channels = sum(size for name, size in sizes.items() if "mlp" in name)
    kept = low_rank.find_channels(model, 0.75)
    assert sum(sizes.values()) - channels + kept * channels == pytest.approx(0.75 * sum(sizes.values()))
    assert low_rank.find_channels(model, 0.01) is None  # the feed-forward layers alone are not so large
    assert not any("lm_head" in name or "embed" in name for name in sizes) and len(sizes) == 14


@pytest.mark.slow
def test_each_model_is_asked_before_and_after_its_healing(tmp_path, capsys):
    out = tmp_path / "out.json"
    low_rank.main(["--tiny", "--shares", "0.6", "--healing-rows", "16", "--out", str(out)])
    found = json.loads(out.read_text())
    whole, *others = found["models"]
    assert [(one["model"], one["share"]) for one in others] == [
        (name, 0.6) for name in ("svd", "weighted", "pruned")
    ]
    for one in others:
        assert one["weights"] < whole["weights"] * (1.0 if one["model"] == "pruned" else one["share"])
        assert one["healed"]["loss"] < one["loss"]  # the model is random: any training helps
    table = capsys.readouterr().out
    assert "| model | weights of the blocks | exact_match | loss | exact_match, healed |" in table
    assert "| trained 1 |" in table and "| weighted 0.6 |" in table
