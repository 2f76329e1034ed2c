"""Weights of the base model that training replaces (methods full and partial): which, and their file."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.common.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


def check_not_quantized(config: Any, method: str) -> None:
    """Check that the weights of a base model are numbers that training can change.

    Raises:
        InputError: they are quantized.
    """
    if getattr(config, "quantization_config", None):
        raise InputError(
            f"the weights of the base model are quantized, and finetune.method {method} trains them",
            "set finetune.method: lora, or choose a base model that is not quantized",
        )


def select_weights(model: Any, modules: int | Sequence[str] | None) -> list[str]:
    """Return the names of the weights to train.

    Args:
        model: a transformers model; its weights may be without values (torch's device `meta`).
        modules: the last so many transformer blocks, or names of modules, whole (`model.layers.29`) or their
            last parts (`mlp`); None for the whole model.

    Raises:
        InputError: the model has fewer blocks, or no such module.
    """
    weights = _list_text_weights(model)
    if modules is None:
        return weights
    if isinstance(modules, int):
        blocks = list_blocks(model)
        if modules > len(blocks):
            raise InputError(
                f"finetune.trained_modules is {modules}, and the base model has {len(blocks)} "
                "transformer blocks",
                f"set it to at most {len(blocks)}, or train the whole model: finetune.method: full",
            )
        modules = blocks[-modules:]
    chosen = {name for module in modules for name in _list_weights_of(model, module, weights)}
    return [name for name in weights if name in chosen]


def list_blocks(model: Any) -> list[str]:
    """Return the names of the transformer blocks, the first one first.

    Raises:
        InputError: they are not found.
    """
    blocks = _find_blocks(model)
    if not blocks:
        count = model.config.get_text_config().num_hidden_layers
        raise InputError(
            f"the {count} transformer blocks of {type(model).__name__} are not found",
            "set finetune.trained_modules to a list of module names",
        )
    return blocks


def _find_blocks(model: Any) -> list[str]:
    from torch.nn import ModuleList

    count = model.config.get_text_config().num_hidden_layers
    parts = model.get_decoder().modules()
    blocks = next((part for part in parts if isinstance(part, ModuleList) and len(part) == count), ())
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(block)] for block in blocks]


def measure_reach(model: Any, trained: Sequence[str]) -> float:
    """Return the share of the blocks that a backward pass goes through: from the first trained weight on.

    All of them, where the blocks are not found.
    """
    blocks = _find_blocks(model)
    if not blocks:
        return 1.0
    count = len(blocks)
    first = count
    for name in trained:
        place = next((n for n, block in enumerate(blocks) if name.startswith(f"{block}.")), None)
        if place is None and name.startswith(f"{_find_name(model, model.get_input_embeddings())}."):
            place = 0
        first = min(first, count if place is None else place)
    return (count - first) / count


def _list_text_weights(model: Any) -> list[str]:
    """Return the names of all weights, tied ones once, without those that read no text, such as pictures."""
    names = [name for name, _ in model.named_parameters()]
    if model.config.get_text_config() is model.config:
        return names
    parts = [_find_name(model, part) for part in (model.get_decoder(), model.get_output_embeddings())]
    return [name for name in names if any(name.startswith(f"{part}.") for part in parts)]


def _find_name(model: Any, wanted: Any) -> str:
    return next(str(name) for name, module in model.named_modules() if module is wanted)


def _list_weights_of(model: Any, module: str, weights: Sequence[str]) -> list[str]:
    names = [name for name, _ in model.named_modules() if name]
    found = [name for name in names if name == module or name.endswith(f".{module}")]
    if not found:
        near = difflib.get_close_matches(module, {*names, *(name.rpartition(".")[2] for name in names)}, 3)
        raise InputError(
            f"finetune.trained_modules has {module!r}, and the base model has no such module",
            f"use names of its modules{', such as ' if near else ''}{', '.join(sorted(near))}, "
            "or a number for its last transformer blocks",
        )
    owned = [name for name in weights if any(name.startswith(f"{part}.") for part in found)]
    if not owned:
        raise InputError(
            f"finetune.trained_modules has {module!r}, which has no weights of its own that read text",
            "an output layer that is tied to the embedding is trained with it: name the embedding",
        )
    return owned


def check_shardable(model: Any, trained: Iterable[str]) -> None:
    """Check that the weights of a model can be shared among processes, block by block.

    Args:
        model: a transformers model; its weights may be without values (torch's device `meta`).
        trained: the names of what is trained.

    Raises:
        InputError: it has no blocks, weights that cannot be cut, or experts that only some rows reach.
    """
    fix = "set finetune.sharding: none, and train in as many processes as have room for the whole model"
    kind = f"finetune.sharding shares the blocks of a model among processes, and {type(model).__name__}"
    if not _find_blocks(model):
        raise InputError(f"{kind} has none that are found", fix)
    if whole := [name for name, weight in model.named_parameters() if not weight.dim()]:
        raise InputError(f"{kind} has weights of a single number: {whole[0]}", fix)
    # A process whose rows reach another expert has other gradients, and all would wait for them for ever.
    if experts := [name for name in trained if "expert" in name]:
        raise InputError(f"{kind} has experts, of which not every row trains each: {experts[0]}", fix)


def cut_shard(weight: Tensor, values: Tensor) -> Tensor:
    """Return the part of values that this process keeps of a weight: of its rows, equal parts rounded up."""
    mesh = weight.device_mesh  # type: ignore[attr-defined]
    size = -(-len(values) // mesh.size())
    return values[mesh.get_local_rank() * size :][:size]


def put_values(weight: Tensor, values: Tensor) -> None:
    """Replace the values of a weight, of a shared one those of this process's part, in the weight's dtype."""
    import torch
    from torch.distributed.tensor import DTensor

    with torch.no_grad():
        if isinstance(weight, DTensor):
            weight.to_local().copy_(cut_shard(weight, values))
        else:
            weight.copy_(values)


def list_trained(model: Any) -> dict[str, Tensor]:
    """Return the weights that are being trained, by name; tied ones once."""
    return {name: weights for name, weights in model.named_parameters() if weights.requires_grad}


def write_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write the weights that are being trained, in the dtype in which they are trained."""
    from safetensors.torch import save_file

    values = {name: values.detach().cpu().contiguous() for name, values in weights.items()}
    save_file(values, path, metadata={"format": "pt"})


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a file of weights.

    Raises:
        InputError: it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} cannot be read: {error}", f"write it again, or empty {path.parent}"
        ) from None


def put_weights(model: Any, weights: Mapping[str, Tensor], source: Path) -> None:
    """Replace weights of the model, each in the dtype that the model has there.

    Raises:
        InputError: the model has not all of them, or in another shape; then none is replaced.
    """
    own = dict(model.named_parameters())
    here = {name: tuple(own[name].shape) if name in own else None for name in weights}
    odd = sorted(name for name, values in weights.items() if tuple(values.shape) != here[name])
    if odd:
        raise InputError(
            f"{source} does not fit the base model, in {len(odd)} of {len(weights)} weights: {odd[0]} is "
            f"{tuple(weights[odd[0]].shape)} there and {here[odd[0]]} here",
            "fetch the base model that it was trained on, or train again: dvc repro finetune",
        )
    for name, values in weights.items():
        put_values(own[name], values)
