"""The log-probability of each sequence's learned tokens, with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from stages.finetune.objectives.protocol import Batch
from stages.finetune.shared_prefix import Layout

# Rows of logits widened to float32 at once, as in `answer_loss`.
_CHUNK = 128


def sum_log_probabilities(model: Any, layout: Layout, learned: Sequence[int]) -> Tensor:
    """Return the log-probability of what is learned of each sequence of a batch, in float32.

    Only the answers' tokens count, of which `Layout` has the logits; those of prompts are never computed.

    Args:
        learned: how many tokens are learned of each sequence.

    Returns:
        shape (sequences,).
    """
    each = read_log_probabilities(layout.answer_logits(model), layout.targets)
    if not learned:  # of a process that computes along: a gradient of zero
        return each
    return torch.stack([part.sum() for part in each.split(list(learned))])


def compute_log_probabilities(model: Any, batch: Batch) -> Tensor:
    """Return `sum_log_probabilities` of a batch."""
    return sum_log_probabilities(model, batch.layout, batch.learned)


def read_log_probabilities(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Return log softmax(logits / temperature)[target] of each row, computed in float32.

    Where gradients are wanted the logits are overwritten with theirs, as in `sum_cross_entropy`.

    Args:
        logits: shape (rows, words), of any float dtype.
        targets: shape (rows,).
    """
    found: Tensor = _LogProbabilities.apply(logits, targets, temperature)
    return found


class _LogProbabilities(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        found = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
        gradient = logits.detach()
        for start in range(0, logits.shape[0], _CHUNK):
            part, wanted = gradient[start : start + _CHUNK], targets[start : start + _CHUNK, None]
            wide = torch.log_softmax(part.float() / temperature, dim=-1)
            found[start : start + _CHUNK] = wide.gather(1, wanted)[:, 0]
            if ctx.needs_input_grad[0]:
                # The target's minus each word's probability.
                wide = wide.exp_().neg_()
                wide.scatter_add_(1, wanted, torch.ones_like(wanted, dtype=torch.float32))
                part.copy_(wide.div_(temperature))
        ctx.save_for_backward(gradient)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grads[0].to(gradient.dtype)[:, None]), None, None
