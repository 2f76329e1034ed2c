"""The adapter: add a new one to the base model, give it the weights of another, save it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import set_seed

from stages.common.artifacts import atomic_dir, read_json, write_json
from stages.common.errors import InputError
from stages.common.logs import get_logger
from stages.common.model.adapter import CONFIG, PAGE, WEIGHTS, InitialAdapter, write_trained_ids
from stages.common.model.loading import load_base, pick_device, pick_dtype
from stages.common.model.targets import check_rank, check_targets
from stages.finetune.recipe import Recipe

logger = get_logger("finetune")


def build_model(base: Path, recipe: Recipe, initial: InitialAdapter | None = None) -> PeftModel:
    """Load the base model and add an adapter, with the weights of `start` or initialized from the seed.

    Raises:
        InputError: the base model has none of the target modules, or `start` does not fit the recipe.
    """
    device = pick_device()
    model = load_base(base, pick_dtype(device, recipe.dtype), device)
    set_seed(recipe.seed)
    targets = recipe.target_modules
    check_rank(getattr(model.config.get_text_config(), "hidden_size", None), recipe.rank)
    check_targets(model, targets)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=match_other_parts(model),
        task_type="CAUSAL_LM",
    )
    try:
        # The adapter's own weights stay float32: small updates would vanish in bfloat16.
        tuned = get_peft_model(model, config)
    except ValueError as error:
        raise InputError(
            f"the adapter does not fit the base model: {error}",
            "set finetune.target_modules to all-linear, or to module names that the model has",
        ) from None
    if initial:
        load_weights(tuned, initial)
        logger.info("starting from the adapter of %s", initial.version)
    return tuned


def match_other_parts(model: Any) -> str | None:
    """Return a pattern of the modules that read no text, such as pictures; None where all do.

    Rows are text: an adapter there would never be trained.
    """
    if model.config.get_text_config() is model.config:
        return None
    decoder = next(name for name, module in model.named_modules() if module is model.get_decoder())
    return rf"(?!{re.escape(decoder)}\.).*"


def load_weights(model: PeftModel, initial: InitialAdapter) -> None:
    """Replace the weights of the new adapter of `model` by those of the adapter in `start`.

    peft silently skips tensors that it does not find, which would leave the adapter half random. So the
    file must hold every tensor, with its shape, and no other.

    Raises:
        InputError: the two adapters differ in their settings or tensors; the message has both.
    """
    fix = (
        f"set finetune.rank, alpha and target_modules to those of {initial.folder}, "
        f"or empty {initial.folder} to train a new adapter"
    )
    _check_settings(model, initial, fix)
    try:
        weights = load_file(initial.folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{initial.folder / WEIGHTS} cannot be read: {error}",
            f"write it again, or empty {initial.folder}",
        ) from None
    _check_tensors(model, weights, initial, fix)
    set_peft_model_state_dict(model, weights)


def _check_settings(model: PeftModel, initial: InitialAdapter, fix: str) -> None:
    """Compare rank, alpha and target modules, in the words of `params.yaml`."""
    config = model.peft_config["default"]
    wanted = _settings(config.r, config.lora_alpha, config.target_modules)
    saved = read_json(initial.folder / CONFIG)
    found = _settings(saved.get("r"), saved.get("lora_alpha"), saved.get("target_modules"))
    different = [name for name in wanted if wanted[name] != found[name]]
    if different:
        lines = "\n".join(f"  {name}: {wanted[name]} here, {found[name]} there" for name in different)
        raise InputError(
            f"the adapter in {initial.folder} ({initial.version}) differs from the recipe:\n{lines}",
            fix,
        )


def _settings(rank: Any, alpha: Any, targets: Any) -> dict[str, Any]:
    modules = targets if isinstance(targets, str) or targets is None else tuple(sorted(targets))
    return {"rank": rank, "alpha": alpha, "target_modules": modules}


def _check_tensors(model: PeftModel, weights: dict[str, Tensor], initial: InitialAdapter, fix: str) -> None:
    """Compare the names and shapes of all tensors."""
    here = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
    there = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if here != there:
        odd = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
        raise InputError(
            f"the tensors of the adapter in {initial.folder} ({initial.version}) differ from the recipe's, "
            f"{len(odd)} of them: {odd[0]} is {there.get(odd[0])} and should be {here.get(odd[0])}",
            fix,
        )


def save_adapter(model: PeftModel, folder: Path, trained_ids: Iterable[str]) -> None:
    """Write the adapter and the ids of its training rows, so that equal adapters are equal bytes."""
    with atomic_dir(folder) as temporary:
        model.save_pretrained(str(temporary))
        # peft's own card is an empty form; the model_card stage writes the real one.
        (temporary / PAGE).unlink(missing_ok=True)
        config = read_json(temporary / CONFIG)
        if isinstance(config["target_modules"], list):
            # peft writes a set, in an order that changes from process to process.
            config["target_modules"] = sorted(config["target_modules"])
        write_json(temporary / CONFIG, config)
        write_trained_ids(trained_ids, temporary)
