"""A model that the processes share: each keeps a part of every weight, and all compute with whole ones.

torch's FSDP2 (`fully_shard`): the weights of a block are gathered from all processes for the moment in which
it computes, forward and backward, and its gradients are summed where each part is kept. So the processes must
compute in step: the same blocks in the same order, as often. Zhao et al. 2023, "PyTorch FSDP: Experiences on
Scaling Fully Sharded Data Parallel".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import Module, Parameter

from stages.common.model.replaced import (
    check_shardable,
    cut_shard,
    list_blocks,
    list_trained,
    put_values,
)
from stages.finetune.devices.group import count_processes, gather, is_main

# What torch keeps on a module besides the module's own: a copy of a model must not have it.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")
_STATE = "__composable_api"
_GATHERED_IN = "gathered_in"  # the dtype in which a model's weights are gathered, if not in their own


def shard_model(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Share a model that was loaded into main memory among the processes, one block after the other.

    So no device ever holds more of it than its part and one block. What is trained becomes float32, and is
    gathered in the dtype of the training where that is a weight of the base model.

    Args:
        model: of transformers or peft, on the CPU.
        device: of this process.
        dtype: in which the steps compute.

    Raises:
        InputError: this architecture cannot be shared.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    trained = list_trained(model)
    check_shardable(base, trained)
    mesh = init_device_mesh(device.type, (count_processes(),))
    # An adapter stays float32 beside the block's frozen weights, and casts by itself.
    is_cast = base is model and dtype != torch.float32
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False) if is_cast else None
    blocks = [base.get_submodule(name) for name in list_blocks(base)]
    for module in (*blocks, model):
        for weight in module.parameters():
            if weight.requires_grad and not isinstance(weight, DTensor):
                weight.data = weight.data.float()
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy or MixedPrecisionPolicy())
    setattr(model, _GATHERED_IN, policy and dtype)


def is_sharded(model: Any) -> bool:
    """Return whether a model is shared among the processes."""
    return isinstance(model, FSDPModule)


def list_groups(model: Any) -> list[list[Tensor]]:
    """Return the weights that are gathered together: those of each block, and the others last."""
    groups: list[list[Tensor]] = []
    seen: set[int] = set()
    for module in reversed([module for module in model.modules() if isinstance(module, FSDPModule)]):
        own = [weight for weight in module.parameters() if id(weight) not in seen]  # type: ignore[attr-defined]
        seen |= {id(weight) for weight in own}
        groups.append(own)
    return groups


def count_gathered_bytes(model: Any) -> int:
    """Return the most bytes of whole weights and gradients that are in memory at once during a step.

    What is outside the blocks is gathered for the whole forward pass, and of the blocks the one that computes
    and the next. The gradients of one group are whole, and once more while they are summed.
    """
    groups = [_count_group_bytes(group) for group in list_groups(model)]
    if not groups:
        return 0
    *blocks, (outside, outside_gradients) = groups
    whole = sorted((weights for weights, _ in blocks), reverse=True)
    gradients = max([outside_gradients, *(one for _, one in blocks)])
    return outside + sum(whole[:2]) + 2 * gradients


def _count_group_bytes(group: list[Tensor]) -> tuple[int, int]:
    weights = sum(weight.numel() * weight.element_size() for weight in group)
    return weights, sum(w.numel() * w.element_size() for w in group if w.requires_grad)


def is_part(weight: Tensor) -> bool:
    """Return whether this process keeps only a part of a weight."""
    return isinstance(weight, DTensor)


def get_part(weight: Tensor) -> Tensor:
    """Return what this process keeps of a weight: a part, or all of it."""
    return weight.to_local() if isinstance(weight, DTensor) else weight  # type: ignore[no-any-return]


@contextmanager
def keep_in_step(model: Any, compute: Callable[[], object]) -> Iterator[None]:
    """Let each process compute as often as it needs inside the block, though all gather the weights together.

    Before each pass all tell whether they still compute. Who has finished computes along until all have.

    Args:
        compute: one pass of any input, whose result is not used.
    """
    if not is_sharded(model):
        yield
        return
    hook = model.register_forward_pre_hook(lambda *_: _tell(gather(True)), prepend=True)
    try:
        yield
    finally:
        hook.remove()
    while any(gather(False)):
        compute()


def _tell(_: object) -> None:
    """Return nothing: a hook that returns something changes the input."""


def gather_trained(model: Any) -> dict[str, Tensor]:
    """Return the trained weights, whole, in main memory: to the first process; all must call it."""
    found = {}
    for name, weight in list_trained(model).items():
        whole = gather_whole(weight.detach())
        if is_main():
            found[name] = whole.cpu().contiguous()
    return found


def put_adapter(model: PeftModel, weights: Mapping[str, Tensor]) -> None:
    """Replace the weights of the adapter of a model; of a shared one each process replaces its parts."""
    own = get_peft_model_state_dict(model)  # by the names that a file of peft has
    for name, values in weights.items():
        put_values(own[name], values)


def gather_whole(values: Tensor) -> Tensor:
    """Return the whole of which each process has a part; all must call it."""
    return values.full_tensor() if isinstance(values, DTensor) else values  # type: ignore[no-any-return]


def bring_together(model: Any) -> None:
    """Give the first process what was trained whole, in main memory, to write it; none computes any more."""
    if not is_sharded(model):
        return
    names = list_trained(model)
    whole = gather_trained(model)
    by_id = {id(names[name]): Parameter(values) for name, values in whole.items()}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if id(weight) in by_id:  # tied weights are one weight in several modules
                module._parameters[name] = by_id[id(weight)]


def gather_optimizer_state(optimizer: Any) -> dict[str, Any]:
    """Return the state of an optimizer as one process has it that trains alone; all must call it.

    Only that of the first process has the averages.
    """
    state: dict[str, Any] = optimizer.state_dict()
    whole: dict[int, dict[str, Any]] = {}
    for number, values in state["state"].items():
        gathered = {name: gather_whole(value) for name, value in values.items()}
        if is_main():
            whole[number] = {name: value.cpu() for name, value in gathered.items()}
    return {**state, "state": whole}


def cut_optimizer_state(state: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
    """Return this process's part of the state of an optimizer that one process has which trains alone."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    parts = {
        number: {name: _cut_like(weights[number], value) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": parts}


def _cut_like(weight: Tensor, values: Tensor) -> Tensor:
    if not isinstance(weight, DTensor) or values.shape != weight.shape:  # the number of updates
        return values.clone()
    part = cut_shard(weight, values).to(weight.device, copy=True)
    return DTensor.from_local(
        part,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )


def make_whole(model: Any, weight: Tensor) -> Tensor:
    """Return a weight like the one that a shared model gathers, with any values."""
    dtype = getattr(model, _GATHERED_IN, None) or weight.dtype
    return Parameter(
        torch.empty(weight.shape, dtype=dtype, device=weight.device), requires_grad=weight.requires_grad
    )


@contextmanager
def taken_apart(model: Module, memo: dict[int, Any]) -> Iterator[None]:
    """Let a sharded model be copied inside the block, without what makes its modules gather their weights.

    Args:
        memo: of `copy.deepcopy`; what is left out is put there.
    """
    sharded = [(module, type(module)) for module in model.modules() if isinstance(module, FSDPModule)]
    for module, kind in sharded:
        for name, value in vars(module).items():
            if name in _HOOKS or name.startswith(_STATE):
                memo[id(value)] = type(value)()
        module.__class__ = kind.__bases__[1]
    try:
        yield
    finally:
        for module, kind in sharded:
            module.__class__ = kind
