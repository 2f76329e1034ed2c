"""How much memory a training will take, before it takes it, and what would fit.

The largest batch goes through a copy of the model whose tensors have shapes and no values, and what autograd
keeps of it for the backward pass is counted. So the number is that of this architecture, this method and this
attention. The backward pass begins with all of that, and holds the gradients of one layer. Added are the
weights, which are there already, gradients and AdamW's two averages of what is trained, and the room of one
part of the logits. With gradient checkpointing what the layers keep is their inputs, and twice what one layer
keeps. Validation rows are asked between steps, when a step's activations are gone: their keys, values and
logits count where they are more than those.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from stages.common.chat.template import Encoded
from stages.common.errors import InputError
from stages.common.logs import get_logger, is_full_memory
from stages.common.machine.memory import format_bytes, read_free_memory, read_held_memory, read_peak_memory
from stages.common.machine.training_memory import count_kernel_bytes
from stages.finetune.answer_loss import find_chunked_head, measure_chunk, sum_answer_loss
from stages.finetune.devices.group import count_local_processes, count_processes
from stages.finetune.devices.sharding import (
    count_gathered_bytes,
    get_part,
    is_part,
    make_whole,
    taken_apart,
)
from stages.finetune.kernels.checkpointing import list_layers
from stages.finetune.shared_prefix import Layout, lay_out
from stages.finetune.speedups import is_packed

logger = get_logger("finetune")

# Of the bytes that autograd keeps, what a step takes: blocks of one size do not fill the holes of another.
FRAGMENTATION = 1.1
UNCERTAINTY = 0.1  # of the estimate; docs/benchmarks.md has the measured differences
PLAIN_UNCERTAINTY = 0.3  # where a batch is padded rows: torch's attention keeps other tensors with a mask
ADAMW_BYTES = 8  # two averages in float32
LOGITS_AT_ONCE = 128  # rows that the loss widens to float32, twice


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """The bytes that a training takes at most.

    Attributes:
        held: by the process before the first step, with the weights.
        optimizer: gradients and averages of the trained weights.
        activations: of the largest batch, kept for the backward pass; and what is gathered of a shared model.
        kernels: of the code of products that has been compiled by the end.
        answers: of the validation rows that are asked at once, while there are no activations.
        tokens: that are computed of the largest batch.
        reached: the most that the process has held so far: reading the weights can take more than the steps.
    """

    held: int
    optimizer: int
    activations: int
    kernels: int = 0
    answers: int = 0
    tokens: int = 1
    reached: int = 0

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        return max(self.reached, self.held + self.added)

    @property
    def added(self) -> int:
        """What the training takes in addition to what is held."""
        return self.optimizer + self.kernels + max(self.activations, self.answers)

    def describe(self) -> str:
        """Return the parts of the estimate as text."""
        asked = f" or {format_bytes(self.answers)} for validation rows" if self.answers else ""
        code = f", {format_bytes(self.kernels)} for the code of products" if self.kernels else ""
        return (
            f"{format_bytes(self.held + self.added)}: {format_bytes(self.held)} before the first step, "
            f"{format_bytes(self.optimizer)} for the optimizer, {format_bytes(self.activations)} for a batch"
            f"{asked}{code}"
        )


@dataclass(frozen=True, slots=True)
class Kept:
    """The bytes that autograd keeps of a batch.

    Attributes:
        layers: of each layer that can be computed again, and `inputs` those of what goes into all of them.
    """

    outside: int
    layers: tuple[int, ...]
    inputs: int

    def count(self, checkpointing: bool) -> int:
        """Return the most that there is at once: what is kept, and the gradients of what one layer keeps."""
        largest = max(self.layers, default=0)
        if not checkpointing:
            return self.outside + sum(self.layers) + largest
        return self.outside + self.inputs + 2 * largest  # one layer is computed again


class MemoryPlan:
    """Estimates the memory of the training of one model for batches of any size.

    Args:
        model: as it will be trained, its faster steps switched on.
        examples: all rows.
        share_prefix: whether a batch is one sequence.
        sequences_of_row: how many of the examples a row of a batch has.

    Attributes:
        batches: of the training; each may have a length of its own.
        checkpointing: whether layers are computed again in the backward pass.
        can_checkpoint: whether they could be, and are not.
        count_answers: returns the bytes of the answers to validation rows asked at once, by rows of a batch.
    """

    def __init__(
        self,
        model: Any,
        examples: Sequence[Encoded],
        pad_id: int,
        share_prefix: bool,
        sequences_of_row: int = 1,
    ) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.device = model.device
        self.uncertainty = UNCERTAINTY if share_prefix else PLAIN_UNCERTAINTY
        self.batches = 1
        self.checkpointing = self.can_checkpoint = False
        self.count_answers: Callable[[int], int] = lambda rows: 0
        self._packed = is_packed(model)
        self._element_bytes = model.dtype.itemsize
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._model = _copy_without_values(model, self._mode)
        self._own = {_key(t) for t in chain(self._model.parameters(), self._model.buffers())}
        trained = [p for p in model.parameters() if p.requires_grad]
        # Several processes average their gradients in buckets, which hold a copy of them; of a shared model
        # each has its part, and what is gathered for a moment.
        self._gathered = count_gathered_bytes(model)
        gradients = 2 if count_processes() > 1 and not self._gathered else 1
        each = (get_part(p).numel() * (gradients * p.element_size() + ADAMW_BYTES) for p in trained)
        self._optimizer = sum(each)
        output = model.get_output_embeddings()  # over words, or the labels of a head
        self._words = len(output.weight) if output is not None else model.config.get_text_config().vocab_size
        self._chunk = measure_chunk(head) if (head := find_chunked_head(model)) is not None else None
        lengths = [len(example.input_ids) for example in examples]
        self._longest = [examples[i] for i in sorted(range(len(lengths)), key=lambda i: -lengths[i])[:64]]
        self._pad_id, self._share_prefix = pad_id, share_prefix
        self._sequences_of_row = sequences_of_row

    def estimate(self, batch_size: int, held: int, max_length: int | None = None) -> MemoryEstimate:
        """Return the estimate for batches of the longest rows, cut to a length where one is given."""
        sequences = batch_size * self._sequences_of_row
        rows = self._longest[:sequences]
        if max_length is not None:
            rows = [_cut(row, max_length) for row in rows]
        # More rows than are looked at take as many times as much.
        return self.estimate_batch(rows, held, sequences / len(rows))

    def estimate_batch(self, rows: Sequence[Encoded], held: int, times: float = 1.0) -> MemoryEstimate:
        """Return the estimate for a batch of these rows, or one of so many times as many."""
        batch = lay_out(rows, self._pad_id, self._share_prefix, self._packed)
        kept = times * self._count_kept(batch).count(self.checkpointing)
        answers = int(times * len(batch.targets))
        logits = 2 * 4 * min(LOGITS_AT_ONCE, answers) * self._words
        if self._chunk is not None:  # of the output layer, which autograd keeps otherwise
            logits += min(answers, self._chunk.rows) * self._chunk.row_bytes
        logits += self._gathered
        asked = self.count_answers(round(times * len(rows)))
        tokens = int(times * batch.input_ids.numel())
        taken = int(kept * FRAGMENTATION) + logits
        kernels = count_kernel_bytes(self._element_bytes, self.device.type, self.batches)
        return MemoryEstimate(held, self._optimizer, taken, kernels, asked, tokens)

    def fits(self, rows: Sequence[Encoded]) -> bool:
        """Return whether the steps of a batch of these rows will certainly fit into the free memory."""
        held, free = read_device_memory(self.device)
        return self._fits(replace(self.estimate_batch(rows, held), answers=0), free)

    def suggest(self, batch_size: int, accumulation: int, held: int, free: int) -> str:
        """Return the settings with which the training fits into the free memory, as a fix.

        Args:
            batch_size: rows of a batch that one process takes.
        """
        size, processes = batch_size, count_processes()
        if self.can_checkpoint:
            twice = copy.copy(self)
            twice.checkpointing = True
            found = twice.estimate(batch_size, held)
            if self._fits(found, free):
                return f"set finetune.gradient_checkpointing: true, which takes {format_bytes(found.peak)}"
        while size > 1:
            size //= 2
            if self._fits(self.estimate(size, held), free):
                steps = accumulation * -(-batch_size // size)
                taken = format_bytes(self.estimate(size, held).peak)
                return (
                    f"set finetune.batch_size: {size * processes} and "
                    f"finetune.gradient_accumulation: {steps}, which take {taken}"
                )
        longest = len(self._longest[0].input_ids)
        for length in range(longest // 64 * 64, 0, -64):
            if self._fits(self.estimate(1, held, length), free):
                return (
                    f"set finetune.batch_size: {processes} and finetune.max_length: {length}, which take "
                    f"{format_bytes(self.estimate(1, held, length).peak)}; longer rows are excluded"
                )
        if self._fits(replace(self.estimate(1, held), answers=0), free):
            return "set finetune.validate_every: null: no validation rows fit, and the steps do"
        return "no batch fits: choose a smaller base model, or a machine with more memory"

    def _fits(self, estimate: MemoryEstimate, free: int) -> bool:
        return estimate.added * (1 + self.uncertainty) <= free

    def _count_kept(self, batch: Layout) -> Kept:
        """Return the bytes that autograd keeps of a batch, without the weights."""
        kept: dict[int, tuple[int, Tensor, int]] = {}
        layers = list_layers(self._model)
        inputs, inside = [0] * len(layers), [-1]  # which layer computes; -1: none of them

        def keep(tensor: Tensor) -> Tensor:
            kept.setdefault(_key(tensor), (tensor.untyped_storage().nbytes(), tensor, inside[-1]))
            return tensor

        def enter(number: int, _: Any, states: tuple[Any, ...]) -> None:
            inputs[number] = sum(s.untyped_storage().nbytes() for s in states if isinstance(s, Tensor))
            inside.append(number)

        hooks = [layer.register_forward_pre_hook(partial(enter, n)) for n, layer in enumerate(layers)]
        hooks += [layer.register_forward_hook(lambda *_: (inside.pop(), None)[1]) for layer in layers]
        with self._mode, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = sum_answer_loss(self._model, batch.to(self.device), _read_logits)
        del loss
        for hook in hooks:
            hook.remove()
        sizes = dict.fromkeys(range(-1, len(layers)), 0)
        for key, (size, _, layer) in kept.items():
            sizes[layer] += size if key not in self._own else 0
        return Kept(sizes.pop(-1), tuple(sizes.values()), sum(inputs))


def plan_memory(
    model: Any, examples: Sequence[Encoded], pad_id: int, share_prefix: bool, sequences_of_row: int = 1
) -> MemoryPlan | None:
    """Return the plan of a training; None for a model whose shapes alone cannot be computed."""
    try:
        plan = MemoryPlan(model, examples, pad_id, share_prefix, sequences_of_row)
        plan.estimate(1, 0)
    except Exception as error:  # models are others' code: what it raises without values can be anything
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        logger.info("no estimate of the memory: %s", reason[0])
        return None
    return plan


def check_memory(
    plan: MemoryPlan | None, heaviest: Sequence[Encoded], batch_size: int, accumulation: int
) -> MemoryEstimate | None:
    """Log what this process will hold at most, refuse it if it cannot fit, and return it.

    On a GPU, where no estimate has been compared with a training, it only warns.

    Args:
        heaviest: the largest batch of the training, or this process's share of it.
        batch_size: rows of a batch that one process takes.

    Raises:
        InputError: it takes more than is free, also if the estimate is too high by its uncertainty.
    """
    if plan is None:
        return None
    held, free = read_device_memory(plan.device)
    estimate = plan.estimate_batch(heaviest, held)
    uncertainty = plan.uncertainty if plan.device.type == "cpu" else 1.0
    judge_memory(estimate, free, lambda: plan.suggest(batch_size, accumulation, held, free), uncertainty)
    return estimate if plan.device.type == "cuda" else replace(estimate, reached=read_peak_memory())


def judge_memory(
    estimate: MemoryEstimate, free: int, suggest: Callable[[], str], uncertainty: float = UNCERTAINTY
) -> None:
    """Log, warn or refuse by how much of the free memory a training takes.

    Args:
        uncertainty: share of the estimate by which it may be wrong; with 1 nothing is refused.

    Raises:
        InputError: with what would fit.
    """
    what = f"the training takes about {estimate.describe()}; {format_bytes(free)} are free"
    if estimate.added * (1 - uncertainty) > free:
        raise InputError(f"the memory is too small: {what}", suggest())
    if estimate.added * (1 + min(uncertainty, PLAIN_UNCERTAINTY)) > free:
        logger.warning("%s, which may be too little: %s", what, suggest())
    else:
        logger.info("%s", what)


@contextmanager
def explain_full_memory(plan: MemoryPlan | None, batch_size: int, accumulation: int) -> Iterator[None]:
    """Turn a full memory inside the block into an error with the settings that would fit.

    Raises:
        InputError: the memory was full.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if plan is None or not is_full_memory(error):
            raise
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
    else:
        return
    # Outside the handler: the error holds the tensors of the step.
    held, free = read_device_memory(plan.device)
    needed = plan.estimate(batch_size, held)
    fix = plan.suggest(batch_size, accumulation, held, min(free, int(needed.added * (1 - UNCERTAINTY))))
    raise InputError(f"the memory is full: {message}", fix)


def read_device_memory(device: torch.device) -> tuple[int, int]:
    """Return the bytes that this process holds where it computes, and those that it can still take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        held = torch.cuda.memory_allocated(device)
        return held, free + reserved - held
    return read_held_memory(), read_free_memory() // count_local_processes()


def _copy_without_values(model: Any, mode: Any) -> Any:
    """Return a copy of a model whose parameters and buffers have no values; it takes no memory."""
    memo: dict[int, Any] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        if is_part(tensor):
            with mode:
                memo[id(tensor)] = make_whole(model, tensor)
        else:
            memo[id(tensor)] = mode.from_tensor(tensor)
    with taken_apart(model, memo):
        return copy.deepcopy(model, memo).train()


def _cut(row: Encoded, length: int) -> Encoded:
    ids = row.input_ids[:length]
    return Encoded(ids, min(row.prompt_length, max(1, len(ids) - 1)))


def _read_logits(model: Any, batch: Layout) -> Tensor:
    if batch.attention_mask is None:
        return batch.answer_logits(model)
    # What a mask hides depends on its values, which there are none of; its shapes are those of no mask.
    logits: Tensor = model(input_ids=batch.input_ids, use_cache=False).logits
    return logits.flatten(0, 1)[batch.answer_positions]


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
