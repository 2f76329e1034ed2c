"""The formulas, against values computed by hand and against torch's own gradients."""

import math

import pytest
import torch

from stages.finetune.objectives.distillation import sum_distillation
from stages.finetune.objectives.log_probabilities import read_log_probabilities, sum_log_probabilities
from stages.finetune.objectives.losses import (
    compare_in_groups,
    compute_dpo_losses,
    compute_grpo_losses,
    compute_kto_losses,
    compute_orpo_losses,
    log1mexp,
)
from tests.stages.finetune.objectives.examples import arrange, make_pairs
from tests.tiny import make_model


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_and_their_gradients_are_those_of_pytorch_over_several_chunks(temperature):
    logits, targets = torch.randn(300, 11, requires_grad=True), torch.randint(11, (300,))
    weights = torch.randn(300)
    expected = torch.log_softmax(logits / temperature, dim=-1).gather(1, targets[:, None])[:, 0]
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), logits)
    found = read_log_probabilities(logits * 1.0, targets, temperature)
    torch.testing.assert_close(found, expected)
    leaf = logits.detach().clone().requires_grad_()
    again = read_log_probabilities(leaf * 1.0, targets, temperature)
    (gradient,) = torch.autograd.grad((again * weights).sum(), leaf)
    torch.testing.assert_close(gradient, expected_gradient)


def test_of_a_sequence_only_the_answer_counts():
    model = make_model(1)
    sequences = [pair.rejected for pair in make_pairs()]
    found = sum_log_probabilities(model, arrange(sequences), [one.learned_count for one in sequences])
    for one, value in zip(sequences, found, strict=True):
        ids = torch.tensor([one.input_ids])
        each = torch.log_softmax(model(ids).logits[0, :-1], dim=-1).gather(1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(value, each[one.prompt_length - 1 :].sum())


def test_dpo_compares_the_two_answers_by_how_far_each_has_moved_from_the_reference():
    found = compute_dpo_losses(torch.tensor([0.0, 2.0]), torch.tensor([0.0, -1.0]), 0.1)
    assert found.tolist() == pytest.approx([math.log(2), -math.log(sigmoid(0.3))])


def test_kto_raises_good_answers_above_the_divergence_and_lowers_bad_ones_below_it():
    ratios, good = torch.tensor([2.0, 2.0]), torch.tensor([True, False])
    found = compute_kto_losses(ratios, good, 0.5, 0.1, (1.0, 3.0))
    assert found.tolist() == pytest.approx([1 - sigmoid(0.15), 3 * (1 - sigmoid(-0.15))])


def test_orpo_adds_the_odds_ratio_to_the_answer_loss():
    chosen, rejected = math.log(0.5), math.log(0.2)
    odds = math.log((0.5 / 0.5) / (0.2 / 0.8))
    found = compute_orpo_losses(torch.tensor([chosen]), torch.tensor([rejected]), 0.3)
    assert found.item() == pytest.approx(-chosen - 0.3 * math.log(sigmoid(odds)))


def test_answers_are_compared_with_those_of_their_group():
    found = compare_in_groups(torch.tensor([1.0, 0.0, 3.0, 3.0]), 2)
    assert found.tolist() == pytest.approx(
        [0.5 / (0.5**0.5 + 1e-4), -0.5 / (0.5**0.5 + 1e-4), 0, 0], abs=1e-5
    )


def test_grpo_clips_the_ratio_where_it_would_gain_by_it_and_adds_the_divergence():
    new, old = torch.tensor([0.5, 0.5, 0.0]), torch.zeros(3)
    found = compute_grpo_losses(new, old, torch.tensor([2.0, -2.0, 2.0]), 0.2)
    assert found.tolist() == pytest.approx([-1.2 * 2, math.exp(0.5) * 2, -2.0])
    divergence = compute_grpo_losses(new, new, torch.zeros(3), 0.2, old, 0.1)
    assert divergence.tolist() == pytest.approx([0.1 * (math.exp(-0.5) + 0.5 - 1)] * 2 + [0.0])


def test_distillation_is_the_divergence_from_the_teacher_and_the_answer_loss():
    logits, taught = torch.randn(300, 11, requires_grad=True), torch.randn(300, 9)
    targets, weight, temperature = torch.randint(11, (300,)), 0.3, 2.0
    divergence = torch.nn.functional.kl_div(
        torch.log_softmax(logits[:, :9] / temperature, dim=-1),
        torch.log_softmax(taught / temperature, dim=-1),
        log_target=True,
        reduction="sum",
    )
    answers = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    expected = weight * temperature**2 * divergence + (1 - weight) * answers
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    leaf = logits.detach().clone().requires_grad_()
    found = sum_distillation(leaf * 1.0, taught, targets, weight, temperature)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, leaf)
    torch.testing.assert_close(gradient, expected_gradient)


def test_a_certain_answer_has_a_finite_loss_and_gradient():
    """trl#1473: log(1 - p) of a probability that rounds to 1 made the whole model not a number."""
    sure = torch.tensor([0.0, -1e-9, -200.0], requires_grad=True)
    loss = compute_orpo_losses(sure, torch.tensor([-1.0, 0.0, -0.5]), 0.1).sum()
    (gradient,) = torch.autograd.grad(loss, sure)
    assert math.isfinite(loss.item()) and bool(gradient.isfinite().all())
    values = torch.tensor([-1e-4, -0.5, -0.6931, -0.7, -30.0], dtype=torch.float64)
    torch.testing.assert_close(log1mexp(values), torch.log(1 - torch.exp(values)), rtol=1e-9, atol=1e-12)
