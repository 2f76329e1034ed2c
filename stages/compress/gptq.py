"""Round the weights of linear layers to 4 bits so that their outputs on training rows change least.

GPTQ (Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR): columns are rounded one after the other, and the rest of the row makes up for the error,
weighted by how the inputs of the layer vary together. Blocks are done in their order, each on the outputs of
the rounded ones before it. The scales are those of GGUF's Q4_0, so the file holds these very numbers.

Embedding, output layer and norms stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from stages.common.errors import InputError
from stages.common.gguf.quantization import GROUP, HIGHEST, LOWEST, find_scales
from stages.common.model.replaced import list_blocks

DAMPING = 0.01  # of the mean of the diagonal, as in the paper
Tensor = Any  # torch.Tensor, which is imported only where it is needed


def fit_weights(
    model: Any,
    rows: Sequence[list[int]],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Replace the weights of the linear layers in all blocks by rounded ones.

    Args:
        model: in float32 on the CPU.
        rows: token ids of training rows.
        on_progress: called with the number of blocks done, and of all.

    Raises:
        InputError: a weight or an input is not a finite number.
    """
    change_layers(model, rows, round_weights, on_progress)


def change_layers(
    model: Any,
    rows: Sequence[list[int]],
    change: Callable[[Tensor, Tensor, str], Tensor],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Replace the weights of the linear layers in all blocks, each on the outputs of the changed ones before.

    Args:
        change: returns the new weights of a layer, from its weights [outputs, inputs], the second moments of
            its inputs, and its name.

    The others are those of `fit_weights`.
    """
    import torch

    names = list_blocks(model)
    blocks = [model.get_submodule(name) for name in names]
    with torch.inference_mode():
        states, settings = _record_inputs(model, blocks, rows)
        for number, block in enumerate(blocks):
            layers = _list_layers(block)
            moments = _measure_moments(block, layers, states, settings[number])
            for name, layer in layers.items():
                layer.weight.copy_(change(layer.weight, moments[name], f"{names[number]}.{name}"))
            states = [_run(block, state, one) for state, one in zip(states, settings[number], strict=True)]
            on_progress(number + 1, len(blocks))


def _list_layers(block: Any) -> dict[str, Any]:
    """Return the linear layers of a block whose rows can be cut into groups."""
    import torch

    return {
        name: layer
        for name, layer in block.named_modules()
        if isinstance(layer, torch.nn.Linear) and layer.in_features % GROUP == 0
    }


def _record_inputs(
    model: Any, blocks: Sequence[Any], rows: Sequence[list[int]]
) -> tuple[list[Tensor], list[list[dict[str, Any]]]]:
    """Return the input of the first block for each row, and each block's other arguments for each row."""
    import torch

    states: list[Tensor] = []
    settings: list[list[dict[str, Any]]] = [[] for _ in blocks]

    def record(number: int) -> Callable[[Any, Any, dict[str, Any]], None]:
        def hook(_block: Any, arguments: Any, named: dict[str, Any]) -> None:
            if number == 0:
                states.append(arguments[0])
            settings[number].append(named)

        return hook

    hooks = [
        block.register_forward_pre_hook(record(number), with_kwargs=True)
        for number, block in enumerate(blocks)
    ]
    try:
        for row in rows:
            model.get_decoder()(input_ids=torch.tensor([row]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return states, settings


def _run(block: Any, state: Tensor, named: dict[str, Any]) -> Tensor:
    found = block(state, **named)
    return found[0] if isinstance(found, tuple) else found


def _measure_moments(
    block: Any, layers: dict[str, Any], states: Sequence[Tensor], settings: Sequence[dict[str, Any]]
) -> dict[str, Tensor]:
    """Return the second moments of each layer's inputs, [inputs, inputs], summed over all tokens."""
    import torch

    moments = {name: torch.zeros(layer.in_features, layer.in_features) for name, layer in layers.items()}

    def add(name: str) -> Callable[[Any, Any], None]:
        def hook(_layer: Any, arguments: Any) -> None:
            inputs = arguments[0].reshape(-1, moments[name].shape[0]).float()
            moments[name].addmm_(inputs.T, inputs)

        return hook

    hooks = [layer.register_forward_pre_hook(add(name)) for name, layer in layers.items()]
    try:
        for state, named in zip(states, settings, strict=True):
            _run(block, state, named)
    finally:
        for hook in hooks:
            hook.remove()
    return moments


def round_weights(weights: Tensor, moments: Tensor, name: str = "the layer") -> Tensor:
    """Return weights [outputs, inputs] as GGUF's Q4_0 can hold them.

    Args:
        moments: second moments of the inputs.
        name: of the layer, for an error.

    Raises:
        InputError: a weight or a moment is not a finite number.
    """
    import torch

    if not (torch.isfinite(weights).all() and torch.isfinite(moments).all()):
        raise InputError(
            f"{name} has weights or inputs that are not finite numbers",
            "the training has diverged: lower finetune.learning_rate and train again",
        )
    size = len(moments)
    damped = moments + torch.eye(size) * (DAMPING * moments.diagonal().mean()).clamp(min=1e-8)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    carry = torch.linalg.cholesky(inverse, upper=True)
    left, rounded = weights.float().clone(), torch.empty(weights.shape)
    for start in range(0, size, GROUP):
        stop = start + GROUP
        part = left[:, start:stop].clone()
        scales = torch.from_numpy(find_scales(part.numpy()))[:, 0]
        divisors = torch.where(scales == 0, torch.ones_like(scales), scales)
        errors = torch.empty_like(part)
        for place in range(GROUP):
            column, own = part[:, place], carry[start + place, start:stop]
            rounded[:, start + place] = (column / divisors).round().clamp(LOWEST, HIGHEST) * scales
            errors[:, place] = (column - rounded[:, start + place]) / own[place]
            part[:, place + 1 :] -= errors[:, place, None] * own[place + 1 :]
        left[:, stop:] -= errors @ carry[start:stop, stop:]
    return rounded.to(weights.dtype)
