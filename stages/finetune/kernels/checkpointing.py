"""Gradient checkpointing: the layers keep their inputs only, and are computed again in the backward pass.

A step then takes about a third more time, and its activations are those of one layer and the inputs of all.
The results are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from stages.common.errors import InputError
from stages.common.logs import get_logger
from stages.common.model.virtual_tokens import has_prefix

logger = get_logger("finetune")


def list_layers(model: Any) -> list[Any]:
    """Return the layers that transformers can compute again.

    None of a model with a learned prefix: such a layer gets no cache, and the prefix is one.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    if has_prefix(model):
        return []
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def decide_checkpointing(model: Any, wanted: bool | str, fits: Callable[[], bool]) -> bool:
    """Return whether layers are to be computed again: it is wanted, or `auto`, and the memory is too small.

    Args:
        wanted: `finetune.gradient_checkpointing`.
        fits: whether a training without it fits into the memory.

    Raises:
        InputError: it is wanted, and the model has no such layers.
    """
    if wanted is False:
        return False
    if not list_layers(model):
        if wanted is True:
            raise InputError(
                f"finetune.gradient_checkpointing is true, and {type(model).__name__} has no layers that "
                "transformers can compute again",
                "set it to auto, and lower finetune.batch_size where the memory is too small",
            )
        return False
    if wanted == "auto" and fits():
        return False
    logger.info("gradient checkpointing: layers are computed twice, which takes less memory and more time")
    return True


def checkpoint_layers(model: Any) -> None:
    """Switch gradient checkpointing on.

    Not by transformers' own function: that also asks for the gradients of the inputs, which nothing needs.
    """
    from torch.utils.checkpoint import checkpoint

    for layer in list_layers(model):
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
