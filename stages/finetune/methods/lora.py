"""LoRA by peft (lora, rslora, dora, and qlora in 4 bits): low-rank matrices next to the frozen weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from transformers import set_seed

from stages.common.artifacts import read_json, write_json
from stages.common.errors import InputError
from stages.common.model.adapter import PAGE, PEFT, InitialAdapter, check_settings, list_settings
from stages.common.model.loading import load_base, pick_device, pick_dtype
from stages.common.model.replaced import read_weights
from stages.common.model.targets import check_experts, check_rank, check_targets, configure_lora
from stages.finetune.devices.sharding import put_adapter
from stages.finetune.methods.nf4 import load_nf4
from stages.finetune.recipe import Recipe


def build_lora(base: Path, recipe: Recipe, to_share: bool = False) -> PeftModel:
    """Load the base model and add an adapter, initialized from the seed.

    Args:
        to_share: leave it in main memory.

    Raises:
        InputError: the base model has none of the target modules.
    """
    device = pick_device()
    load = load_nf4 if recipe.method == "qlora" else load_base
    place = torch.device("cpu") if to_share else device
    return add_adapter(load(base, pick_dtype(device, recipe.dtype), place), recipe)


def add_adapter(model: Any, recipe: Recipe) -> PeftModel:
    """Add an adapter to a base model, initialized from the seed.

    Raises:
        InputError: the base model has none of the target modules, or dora would divide by 0.
    """
    set_seed(recipe.seed)
    targets = recipe.target_modules
    check_rank(getattr(model.config.get_text_config(), "hidden_size", None), recipe.rank)
    check_targets(model, targets)
    check_experts(model, targets, recipe.method, recipe.dropout)
    config = configure_lora(model, recipe.method, recipe.rank, recipe.alpha, recipe.dropout, targets)
    try:
        # The adapter's own weights stay float32: small updates would vanish in bfloat16.
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise InputError(
            f"the adapter does not fit the base model: {error}",
            "set finetune.target_modules to all-linear, or to module names that the model has",
        ) from None
    check_magnitudes(adapted)
    return adapted


def check_magnitudes(model: PeftModel) -> None:
    """Check that no output of a layer has a length of 0, by which dora would divide.

    A length is that of a row of the layer's weight, or of a column where outputs are columns (GPT-2).

    Raises:
        InputError: with the first weight that is all zeros for an output, and how many others are.
    """
    broken = {
        name.removeprefix("base_model.model.").partition(".lora_magnitude_vector.")[0]: lengths
        for name, lengths in model.named_parameters()
        if ".lora_magnitude_vector." in name and not lengths.all()
    }
    if not broken:
        return
    first, lengths = next(iter(broken.items()))
    zeros = (lengths == 0).nonzero().flatten().tolist()
    others = f"; so have {len(broken) - 1} other weights" if len(broken) > 1 else ""
    raise InputError(
        f"finetune.method: dora divides by the length of each output of a layer, and {first}.weight of the "
        f"base model has {len(zeros)} of length 0, the first of them number {zeros[0]}{others}",
        "set finetune.method: lora, or finetune.target_modules to a list without these modules",
    )


def load_lora(model: PeftModel, recipe: Recipe, initial: InitialAdapter) -> None:
    """Replace the weights of the new adapter of `model` by those of `initial`.

    peft silently skips tensors that it does not find, which would leave the adapter half random. So the
    file must hold every tensor, with its shape, and no other.

    Raises:
        InputError: the two adapters differ in their settings or tensors; the message has both.
    """
    targets = model.peft_config["default"].target_modules  # peft's for all-linear: a set of names
    modules = targets if isinstance(targets, str) else tuple(sorted(targets))
    check_settings(initial, {**list_settings(recipe), "target_modules": modules})
    weights = read_weights(initial.folder / PEFT.weights)
    check_tensors(get_peft_model_state_dict(model), weights, initial)
    put_adapter(model, weights)


def check_tensors(own: dict[str, Tensor], weights: dict[str, Tensor], initial: InitialAdapter) -> None:
    """Check that two adapters have the same tensors, by name and shape.

    Raises:
        InputError: with the first that differs.
    """
    here = {name: tuple(tensor.shape) for name, tensor in own.items()}
    there = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if here != there:
        odd = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
        raise InputError(
            f"the tensors of the adapter in {initial.folder} ({initial.version}) differ from the recipe's, "
            f"{len(odd)} of them: {odd[0]} is {there.get(odd[0])} and should be {here.get(odd[0])}",
            f"set the keys of finetune to what the adapter was trained with, or empty {initial.folder} to "
            "train a new adapter",
        )


def save_lora(model: PeftModel, _recipe: Recipe, folder: Path) -> None:
    """Write the adapter as peft reads it, equal ones as equal bytes."""
    write_adapter(model, folder)


def write_adapter(model: PeftModel, folder: Path) -> None:
    """Write an adapter of peft, without what changes from process to process."""
    model.save_pretrained(str(folder))
    # peft's own card is an empty form; the model_card stage writes the real one.
    (folder / PAGE).unlink(missing_ok=True)
    config = read_json(folder / PEFT.config)
    if isinstance(config.get("target_modules"), list):
        # peft writes a set, in an order that changes from process to process.
        config["target_modules"] = sorted(config["target_modules"])
    write_json(folder / PEFT.config, config)
