"""Training weights of the base model itself (methods full and partial)."""

from __future__ import annotations

from functools import partial, update_wrapper
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from stages.common.artifacts import write_json
from stages.common.model.adapter import REPLACED, InitialAdapter, list_settings
from stages.common.model.loading import (
    is_stored_in_bfloat16,
    load_base,
    pick_device,
    pick_dtype,
    read_config,
)
from stages.common.model.replaced import (
    check_not_quantized,
    list_trained,
    put_weights,
    read_weights,
    select_weights,
    write_weights,
)
from stages.finetune.methods.lora import check_tensors
from stages.finetune.recipe import Recipe


def build_replaced(base: Path, recipe: Recipe, to_share: bool = False) -> Any:
    """Load the base model with the weights to train in float32, and the frozen ones in the dtype of training.

    Small updates would vanish in bfloat16; products are computed in it all the same, by autocasting.
    Weights that are loaded in the dtype in which they are stored take no memory: they are mapped. What the
    model itself computes with, such as Gemma's factor of the embedding, is then rounded as with LoRA.

    Args:
        to_share: leave the weights in main memory as they are read: whoever shares them widens its part.

    Raises:
        InputError: the base model has no such modules, or its weights are quantized.
    """
    device = pick_device()
    dtype = pick_dtype(device, recipe.dtype)
    check_not_quantized(read_config(base), recipe.method)
    is_exact = dtype == torch.bfloat16 and is_stored_in_bfloat16(base)
    model = load_base(base, dtype if is_exact else torch.float32, torch.device("cpu"))
    set_seed(recipe.seed)
    chosen = set(select_weights(model, recipe.trained_modules if recipe.method == "partial" else None))
    for name, weights in model.named_parameters():
        weights.requires_grad = name in chosen
        if to_share:
            continue
        weights.data = weights.data.to(torch.float32 if name in chosen else dtype)
    if to_share:
        return model
    if dtype != torch.float32:
        # A partial, not a closure: a copy of the model gets a forward pass of its own.
        model.forward = update_wrapper(partial(_forward_in, model, dtype), type(model).forward)
    return model.to(device)


def _forward_in(model: Any, dtype: torch.dtype, *args: Any, **settings: Any) -> Any:
    with torch.autocast(model.device.type, dtype):
        return type(model).forward(model, *args, **settings)


def load_replaced(model: Any, _recipe: Recipe, initial: InitialAdapter) -> None:
    """Replace the weights to train by those of `initial`, which must be the same ones.

    Raises:
        InputError: it has others, or of another shape.
    """
    path = initial.folder / REPLACED.weights
    weights = read_weights(path)
    check_tensors(list_trained(model), weights, initial)
    put_weights(model, weights, path)


def save_replaced(model: Any, recipe: Recipe, folder: Path) -> None:
    """Write the trained weights under the base model's names, in float32, and the settings of the method."""
    write_weights(list_trained(model), folder / REPLACED.weights)
    config = {"base_model_name_or_path": model.name_or_path, **list_settings(recipe, recipe.labels)}
    write_json(folder / REPLACED.config, config)
