"""The cross entropy of the answers' tokens; for training, its gradient is computed in the same pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from stages.finetune.devices.group import count_processes, gather, get_rank
from stages.finetune.devices.sharding import is_part, keep_in_step
from stages.finetune.shared_prefix import Layout

# Rows of logits widened to float32 at once: with 50,000 words 25 MB, which a processor's cache can hold.
_CHUNK = 128
# Of the output layer's results, at most so many bytes are in memory at once.
_LOGITS_BYTES = 256 << 20
_IN_CHUNKS = "in_chunks"  # the mark of an output layer that is computed so; a copy of the model has it, too


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


def sum_linear_cross_entropy(
    states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int
) -> Tensor:
    """Return `sum_cross_entropy(linear(states, weight, bias), targets)` with a part of the logits at a time.

    Args:
        states: shape (rows, inputs), in the dtype of the weight; the weight and bias are frozen.
        targets: shape (rows,).
        rows: of a part.
    """
    total: Tensor = _LinearCrossEntropySum.apply(states, weight, bias, targets, rows)
    return total


@dataclass(frozen=True, slots=True)
class Chunk:
    """The part of the logits that is in memory at once: at most so many rows of so many bytes."""

    rows: int
    row_bytes: int


def measure_chunk(head: Any) -> Chunk:
    """Return the size of a part of the results of an output layer."""
    row_bytes = head.weight.shape[0] * head.weight.element_size()
    return Chunk(max(_CHUNK, _LOGITS_BYTES // row_bytes), row_bytes)


def sum_answer_loss(
    model: Any,
    batch: Layout,
    read: Callable[[Any, Layout], Tensor] = lambda model, batch: batch.answer_logits(model),
) -> Tensor:
    """Return the sum of the losses of a batch's answer tokens; where possible, the logits are never whole.

    Args:
        model: may be wrapped for several processes.
        read: returns the model's logits for the answers.
    """
    head = find_chunked_head(model)
    if head is None:
        return sum_cross_entropy(read(model, batch), batch.targets)
    with _passing_states_on(head):
        states = read(model, batch)
    return sum_linear_cross_entropy(states, head.weight, head.bias, batch.targets, measure_chunk(head).rows)


def chunk_head(model: Any, batch: Layout) -> bool:
    """Let `sum_answer_loss` compute the output layer of a model in parts; return whether that is possible.

    It is possible where the layer is linear and frozen, and its results are the logits: some models bound or
    scale them.

    Args:
        batch: what is computed to see that.
    """
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or any(p.requires_grad for p in head.parameters()):
        return False
    if is_part(head.weight):  # after the model's pass it is whole no more
        return False
    seen: list[tuple[Tensor, Tensor]] = []
    hook = head.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        logits = batch.answer_logits(model)
    hook.remove()
    if len(seen) != 1 or seen[0][0].dtype != head.weight.dtype:
        return False
    own = seen[0][1].flatten(0, -2)
    # A model that is given no positions to keep computes all of them.
    own = own if len(own) == len(logits) else own[batch.answer_positions]
    is_whole = torch.equal(own, logits)
    setattr(head, _IN_CHUNKS, is_whole)
    return is_whole


def unchunk_head(model: Any) -> None:
    """Let the output layer of a model be computed at once again."""
    head = model.get_output_embeddings()
    if head is not None:
        setattr(head, _IN_CHUNKS, False)


def find_chunked_head(model: Any) -> Any | None:
    """Return the output layer that is computed in parts, if that was chosen."""
    head = getattr(model, "module", model).get_output_embeddings()
    return head if getattr(head, _IN_CHUNKS, False) else None


@contextmanager
def _passing_states_on(head: Any) -> Iterator[None]:
    """Let a model return the inputs of its output layer in place of the logits."""
    head.forward = lambda states: states
    try:
        yield
    finally:
        del head.forward


def compute_loss(model: Any, batch: Layout) -> float:
    """Return the mean loss per answer token of one batch, without gradients."""
    with torch.no_grad():
        batch = batch.to(model.device)
        return float(sum_answer_loss(model, batch)) / len(batch.targets)


def compute_mean_loss(model: Any, batches: Iterable[Layout]) -> float | None:
    """Return the mean loss per answer token over batches, or None if there are none.

    Each process computes its share of the batches; all return the same.
    """
    model.eval()
    total, tokens = 0.0, 0
    first = next(iter(batches := iter(batches)), None)
    if first is None:
        return None
    with keep_in_step(model, lambda: compute_loss(model, first)):
        for batch in islice(chain([first], batches), get_rank(), None, count_processes()):
            total += compute_loss(model, batch) * len(batch.targets)
            tokens += len(batch.targets)
    found = gather((total, tokens))
    total, tokens = sum(loss for loss, _ in found), sum(count for _, count in found)
    return total / tokens


class _CrossEntropySum(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        gradient = logits.detach()
        total = _sum_in_place(gradient, targets, ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grads[0].to(gradient.dtype)), None


class _LinearCrossEntropySum(Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        gradient = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        for start in range(0, states.shape[0], rows):
            part = slice(start, start + rows)
            logits = torch.nn.functional.linear(states[part], weight, bias)
            total += _sum_in_place(logits, targets[part], gradient is not None)
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grads[0].to(gradient.dtype)), None, None, None, None


def _sum_in_place(logits: Tensor, targets: Tensor, with_gradient: bool) -> Tensor:
    """Return the sum of the losses of rows; with their gradient, the logits become that."""
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    for start in range(0, logits.shape[0], _CHUNK):
        part, wanted = logits[start : start + _CHUNK], targets[start : start + _CHUNK, None]
        log_probabilities = torch.log_softmax(part, dim=-1, dtype=torch.float32)
        total -= log_probabilities.gather(1, wanted).sum()
        if with_gradient:
            wide = log_probabilities.exp_()
            wide.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=torch.float32))
            part.copy_(wide)
    return total
