"""The adapter of each method: how the model is built, how it starts from another, what is saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from stages.common.artifacts import atomic_dir
from stages.common.logs import get_logger
from stages.common.model.adapter import (
    HEAD,
    LORA_METHODS,
    PROMPT_METHODS,
    REPLACED_METHODS,
    SHARDED_METHODS,
    InitialAdapter,
    write_trained_ids,
)
from stages.common.model.loading import pick_device, pick_dtype
from stages.finetune.devices.sharding import shard_model
from stages.finetune.methods.head import build_head, load_head
from stages.finetune.methods.lora import build_lora, load_lora, save_lora
from stages.finetune.methods.prompt import build_prompt, load_prompt, save_prompt
from stages.finetune.methods.replaced import build_replaced, load_replaced, save_replaced
from stages.finetune.recipe import Recipe

logger = get_logger("finetune")


@dataclass(frozen=True, slots=True)
class Method:
    """How a model is trained.

    Attributes:
        build: loads the base model, and leaves what is trained as its only weights with gradients.
        load: replaces what is trained by what an adapter of the same method has.
        save: writes what was trained to a folder, equal weights as equal bytes.
        build_to_share: loads the base model into main memory, to be shared among processes; None where the
            method cannot be.
    """

    build: Callable[[Path, Recipe], Any]
    load: Callable[[Any, Recipe, InitialAdapter], None]
    save: Callable[[Any, Recipe, Path], None]
    build_to_share: Callable[[Path, Recipe], Any] | None = None


_LORA = Method(build_lora, load_lora, save_lora)
_SHARED_LORA = replace(_LORA, build_to_share=partial(build_lora, to_share=True))
_PROMPT = Method(build_prompt, load_prompt, save_prompt)
_REPLACED = Method(build_replaced, load_replaced, save_replaced, partial(build_replaced, to_share=True))
METHODS = {
    **dict.fromkeys(LORA_METHODS, _LORA),
    **dict.fromkeys(SHARDED_METHODS, _SHARED_LORA),
    **dict.fromkeys(PROMPT_METHODS, _PROMPT),
    **dict.fromkeys(REPLACED_METHODS, _REPLACED),
    HEAD: Method(build_head, load_head, save_replaced),
}


def build_model(
    base: Path, recipe: Recipe, initial: InitialAdapter | None = None, sharded: bool = False
) -> Any:
    """Load the base model, ready to train, from the weights of `initial` or initialized from the seed.

    Args:
        sharded: share it among the processes; the method is one of `SHARDED_METHODS`.

    Raises:
        InputError: the base model has none of the modules to train, cannot be shared, or `initial` does not
            fit the recipe.
    """
    method = METHODS[recipe.method]
    if sharded:
        assert method.build_to_share is not None  # the parameters are checked
        model = method.build_to_share(base, recipe)
        device = pick_device()
        shard_model(model, device, pick_dtype(device, recipe.dtype))
    else:
        model = method.build(base, recipe)
    if initial:
        method.load(model, recipe, initial)
        logger.info("starting from the adapter of %s", initial.version)
    return model


def save_adapter(model: Any, recipe: Recipe, folder: Path, trained_ids: Iterable[str]) -> None:
    """Write what was trained and the ids of its training rows, so that equal adapters are equal bytes."""
    with atomic_dir(folder) as temporary:
        METHODS[recipe.method].save(model, recipe, temporary)
        write_trained_ids(trained_ids, temporary)
