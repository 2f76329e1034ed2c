"""What a method of training computes beside one forward and one backward pass of each row.

A pass without gradients is the first of three: forward, for the gradients of the inputs, for those of the
weights. What is sampled is taken to be as long as the rows' own answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.common.params.finetune import Finetune


@dataclass(frozen=True, slots=True)
class MethodWork:
    """What a method computes.

    Attributes:
        in_memory: sequences of each row of a batch, which autograd keeps together.
        trained: times a row's tokens that are trained on: of grpo, a prompt with each of its answers.
        scored_before: passes without gradients of all rows, before the first update: the reference's.
        scored: passes without gradients of each batch, beside its own.
        sampled: answers that the model writes to each prompt, each time it is trained on.
        teacher: weights of a teacher.
        is_beside: whether it reads each batch, and stays in memory; else it answers the prompts once.
    """

    in_memory: int = 1
    trained: int = 1
    scored_before: int = 0
    scored: int = 0
    sampled: int = 0
    teacher: int = 0
    is_beside: bool = False


PLAIN = MethodWork()


def read_method(finetune: Finetune, teacher: int = 0) -> MethodWork:
    """Return what the method of params.yaml computes.

    Args:
        teacher: weights of its teacher, if it has one.
    """
    if finetune.method == "dpo":
        return MethodWork(in_memory=2, scored_before=1)  # preflight counts the tokens of both answers
    if finetune.method == "orpo":
        return MethodWork(in_memory=2)
    if finetune.method == "kto":  # the answers, and each prompt with another's answer
        return MethodWork(scored_before=2, scored=1)
    if finetune.method == "grpo":
        size = finetune.group_size
        return MethodWork(size, size, scored=int(finetune.kl_weight > 0), sampled=size)
    if finetune.taught_by is not None:
        return MethodWork(teacher=teacher, is_beside=finetune.distill == "logits")
    return PLAIN
