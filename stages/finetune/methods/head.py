"""Frozen features with a linear layer over the labels of the task (method head)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import set_seed

from stages.common.model.adapter import InitialAdapter, check_settings, list_settings
from stages.common.model.label_head import put_head
from stages.common.model.loading import load_base, pick_device, pick_dtype
from stages.finetune.methods.replaced import load_replaced
from stages.finetune.recipe import Recipe


def build_head(base: Path, recipe: Recipe) -> Any:
    """Load the base model, frozen, with a new output layer over the labels."""
    device = pick_device()
    model = load_base(base, pick_dtype(device, recipe.dtype), device)
    set_seed(recipe.seed)
    model.requires_grad_(False)
    put_head(model, recipe.labels).requires_grad_(True)
    return model


def load_head(model: Any, recipe: Recipe, initial: InitialAdapter) -> None:
    """Replace the weights of the new layer by those of `initial`.

    Raises:
        InputError: it has other labels, or is of another width.
    """
    check_settings(initial, list_settings(recipe, recipe.labels))
    load_replaced(model, recipe, initial)
