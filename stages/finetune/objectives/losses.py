"""The losses of preference methods, from the log-probabilities of whole answers.

Each is the papers' formula, and equal to trl's for the same log-probabilities (a test holds it).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def compute_dpo_losses(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Return -log sigmoid(beta (chosen - rejected)) of each pair.

    Equation 7 of Rafailov et al. 2023, Direct Preference Optimization (arXiv 2305.18290).

    Args:
        chosen, rejected: log(policy / reference) of each answer, shape (pairs,).
    """
    return -logsigmoid(beta * (chosen - rejected))


def compute_kto_losses(
    ratios: Tensor, is_desirable: Tensor, divergence: float, beta: float, weights: tuple[float, float]
) -> Tensor:
    """Return w (1 - sigmoid(± beta (ratio - divergence))) of each answer, minus for bad ones.

    Equation 7 and 8 of Ethayarajh et al. 2024, Model Alignment as Prospect Theoretic Optimization
    (arXiv 2402.01306).

    Args:
        ratios: log(policy / reference) of each answer, shape (answers,).
        divergence: from the reference, at least 0; no gradient goes through it.
        weights: of good and of bad answers.
    """
    sign = torch.where(is_desirable, 1.0, -1.0).to(ratios)
    weight = torch.where(is_desirable, *weights).to(ratios)
    return weight * (1 - torch.sigmoid(sign * beta * (ratios - divergence)))


def compute_orpo_losses(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Return -chosen - beta log sigmoid(log odds(chosen) - log odds(rejected)) of each pair.

    Equations 6 and 7 of Hong et al. 2024, ORPO (arXiv 2403.07691); the first part is the answer loss.

    Args:
        chosen, rejected: mean log-probability of the tokens of each answer, shape (pairs,).
    """
    log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    return -chosen - beta * logsigmoid(log_odds)


def compare_in_groups(rewards: Tensor, size: int) -> Tensor:
    """Return how much better each answer is than its group: (reward - mean) / (standard deviation + 1e-4).

    Where all of a group are alike, none is better: nothing is learned from it.

    Args:
        rewards: shape (groups * size,), those of each group together.
    """
    groups = rewards.float().view(-1, size)
    spread = groups.std(dim=1, keepdim=True)
    return ((groups - groups.mean(dim=1, keepdim=True)) / (spread + 1e-4)).flatten()


def compute_grpo_losses(
    new: Tensor,
    old: Tensor,
    advantages: Tensor,
    epsilon: float,
    reference: Tensor | None = None,
    kl_weight: float = 0.0,
) -> Tensor:
    """Return -min(r A, clip(r, 1 - epsilon, 1 + epsilon) A) + w KL of each token, with r = new / old.

    Equation 3 of Shao et al. 2024, DeepSeekMath (arXiv 2402.03300), with its estimate of the divergence from
    the reference (equation 4), which is never negative.

    Args:
        new, old, reference: log-probabilities of the tokens, shape (tokens,).
        advantages: of the answer of each token.
    """
    ratio = torch.exp(new - old)
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    losses = -torch.minimum(ratio * advantages, clipped * advantages)
    if reference is None:
        return losses
    return losses + kl_weight * (torch.exp(reference - new) - (reference - new) - 1)


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x <= 0, exact near 0 and far from it.

    A probability of 1 in float32 would give minus infinity, and a gradient that is not a number.
    """
    x = x.clamp(max=-torch.finfo(torch.float32).eps)
    near = x > -0.6931  # log 2: Maechler 2012, Accurately Computing log(1 - exp(-|a|))
    # Each branch sees only its own values: the gradient of the other one could be infinite.
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, x))),
    )
