"""Learn what a teacher finds likely at every token of the answers (method distill)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from stages.common.chat.template import Encoded
from stages.finetune.answer_loss import sum_cross_entropy
from stages.finetune.objectives.answers import AnswerRows
from stages.finetune.objectives.protocol import Arrange, Batch
from stages.finetune.shared_prefix import lay_out

# Rows of logits widened to float32 at once, as in `answer_loss`.
_CHUNK = 128


class Distillation(AnswerRows):
    """One sequence a row; the loss is averaged over the answers' tokens.

    Args:
        teacher: a model with the same tokens, in evaluation mode.
        weight: of the teacher; the rest is that of the answers themselves.
        temperature: by which the logits of both models are divided.
    """

    def __init__(
        self, examples: Sequence[Encoded], teacher: Any, pad_id: int, weight: float, temperature: float
    ) -> None:
        super().__init__(examples)
        self.teacher, self.pad_id = teacher, pad_id
        self.weight, self.temperature = weight, temperature

    def collate(self, rows: Sequence[int], arrange: Arrange) -> Batch:
        """Lay out rows for the student, and for the teacher as padded rows, which any model reads."""
        taught = lay_out(self.list_sequences(rows), self.pad_id, False)
        return replace(super().collate(rows, arrange), others=taught)

    def compute_loss(self, model: Any, batch: Batch) -> Tensor:
        """Return the sum of the losses of the answers' tokens."""
        self.record(batch)
        logits, targets = batch.layout.answer_logits(model), batch.layout.targets
        if batch.others is None:  # of a process that computes along
            return sum_cross_entropy(logits, targets)
        batch.record_layout(batch.others, reader=self.teacher)
        with torch.no_grad():
            taught = batch.others.to(self.teacher.device).answer_logits(self.teacher).to(logits.device)
        return sum_distillation(logits, taught, targets, self.weight, self.temperature)


def sum_distillation(
    logits: Tensor, taught: Tensor, targets: Tensor, weight: float, temperature: float
) -> Tensor:
    """Return the sum over rows of w T² KL(teacher ‖ student) + (1 - w) cross entropy, computed in float32.

    Hinton et al. 2015, Distilling the Knowledge in a Neural Network (arXiv 1503.02531): the factor T² keeps
    the size of the gradient. Where gradients are wanted the student's logits are overwritten with theirs.

    Args:
        logits: of the student, shape (rows, words); taught: of the teacher, shape (rows, its words). As many
            words are compared as both have: embeddings are padded to different sizes.
        targets: shape (rows,).
    """
    total: Tensor = _DistillationSum.apply(logits, taught, targets, weight, temperature)
    return total


class _DistillationSum(Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, taught: Tensor, targets: Tensor, weight: float, temperature: float
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        gradient = logits.detach()
        words = min(logits.shape[1], taught.shape[1])
        for start in range(0, logits.shape[0], _CHUNK):
            part, wanted = gradient[start : start + _CHUNK], targets[start : start + _CHUNK, None]
            wide = part.float()
            own = torch.log_softmax(wide, dim=-1)
            student = torch.log_softmax(wide[:, :words] / temperature, dim=-1)
            teacher = torch.log_softmax(taught[start : start + _CHUNK, :words].float() / temperature, dim=-1)
            likely = teacher.exp()
            divergence = (likely * (teacher - student)).sum()
            answers = -own.gather(1, wanted).sum()
            total += weight * temperature**2 * divergence + (1 - weight) * answers
            if ctx.needs_input_grad[0]:
                own = own.exp_()
                own.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=torch.float32))
                own *= 1 - weight
                own[:, :words] += weight * temperature * (student.exp_() - likely)
                part.copy_(own)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grads[0].to(gradient.dtype)), None, None, None, None
