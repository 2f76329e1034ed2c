"""How many floating-point operations a training step takes, by the weights of the model.

A product of a token with a weight is two operations, and there are up to three of them: forward, for the
gradient of the input, and for that of the weight, which a frozen weight has not. So a token takes 4
operations for each frozen weight of the layers, and 6 for each trained one; 2 for a weight that is used
before all trained ones, where no gradient arrives; those of the output layer, only where an answer is
learned. Virtual tokens are tokens of every sequence, and those of prefix tuning are computed by no layer.
The products of attention with itself are not counted (for rows of some hundred tokens one in a
hundred), nor is what gradient checkpointing computes twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Embedding

from stages.common.model.nf4 import count_numbers
from stages.common.model.virtual_tokens import has_virtual_tokens

UNREACHED, FROZEN, TRAINED = 2, 4, 6


@dataclass(frozen=True, slots=True)
class StepWork:
    """Operations of a step for each token in it, and for each token of an answer."""

    each_token: int
    each_answer_token: int

    def count(self, tokens: int, answer_tokens: int) -> int:
        """Return the operations of a batch."""
        return tokens * self.each_token + answer_tokens * self.each_answer_token


def count_work(model: Any, learns: bool = True) -> StepWork:
    """Return the work of a model, from its matrices: those with two dimensions that are no embedding.

    Args:
        learns: whether there is a backward pass; without one each weight takes two operations.
    """
    head = model.get_output_embeddings()
    tables = {id(module.weight) for module in model.modules() if isinstance(module, Embedding)}
    outputs = {id(weight) for weight in head.parameters()} if head is not None else set()
    layers, reached = 0, has_virtual_tokens(model)  # those are before everything
    for weight in model.parameters():  # in the order of their use
        reached = reached or weight.requires_grad
        if weight.dim() == 2 and id(weight) not in tables | outputs:
            layers += _count_operations(weight, reached, learns)
    heads = [weight for weight in head.parameters() if weight.dim() == 2] if head is not None else []
    return StepWork(layers, sum(_count_operations(weight, True, learns) for weight in heads))


def _count_operations(weight: Tensor, reached: bool, learns: bool) -> int:
    if not learns:
        return count_numbers(weight) * UNREACHED
    return count_numbers(weight) * (TRAINED if weight.requires_grad else FROZEN if reached else UNREACHED)
