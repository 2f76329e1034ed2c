"""The cross entropy of the answers' tokens; for training, its gradient is computed in the same pass."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from stages.finetune.devices.group import count_processes, gather, get_rank
from stages.finetune.shared_prefix import Layout

# Rows of logits widened to float32 at once: with 50,000 words 25 MB, which a processor's cache can hold.
_CHUNK = 128


def sum_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of -log softmax(logits)[target] over rows, computed in float32.

    Where gradients are wanted the logits are overwritten with theirs, chunk by chunk, so that nothing of
    their size is allocated again: do not use them afterwards.

    Args:
        logits: shape (rows, words), of any float dtype.
        targets: shape (rows,).
    """
    total: Tensor = _CrossEntropySum.apply(logits, targets)
    return total


def compute_loss(model: Any, batch: Layout) -> float:
    """Return the mean loss per answer token of one batch, without gradients."""
    with torch.no_grad():
        batch = batch.to(model.device)
        return float(sum_cross_entropy(batch.answer_logits(model), batch.targets)) / len(batch.targets)


def compute_mean_loss(model: Any, batches: Iterable[Layout]) -> float | None:
    """Return the mean loss per answer token over batches, or None if there are none.

    Each process computes its share of the batches; all return the same.
    """
    model.eval()
    total, tokens = 0.0, 0
    for batch in islice(batches, get_rank(), None, count_processes()):
        total += compute_loss(model, batch) * len(batch.targets)
        tokens += len(batch.targets)
    found = gather((total, tokens))
    total, tokens = sum(loss for loss, _ in found), sum(count for _, count in found)
    return total / tokens if tokens else None


class _CrossEntropySum(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        gradient = logits.detach()
        for start in range(0, logits.shape[0], _CHUNK):
            part, wanted = gradient[start : start + _CHUNK], targets[start : start + _CHUNK, None]
            log_probabilities = torch.log_softmax(part, dim=-1, dtype=torch.float32)
            total -= log_probabilities.gather(1, wanted).sum()
            if ctx.needs_input_grad[0]:
                wide = log_probabilities.exp_()
                wide.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=torch.float32))
                part.copy_(wide)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grads[0].to(gradient.dtype)), None
