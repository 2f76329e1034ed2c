"""Whether each device has the whole model, or all share one: by `finetune.sharding` and the memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.common.artifacts import read_json
from stages.common.chat.template import Encoded
from stages.common.logs import get_logger
from stages.common.machine.memory import format_bytes
from stages.common.machine.training_memory import Batch, count_state_bytes, estimate_training_memory
from stages.common.model.adapter import LORA_METHODS, REPLACED_METHODS, SHARDED_METHODS, describe_unsharded
from stages.common.model.loading import count_parameters, make_empty, pick_device, pick_dtype
from stages.common.model.replaced import select_weights
from stages.finetune.devices.group import all_agree, count_processes
from stages.finetune.progress.memory import read_device_memory
from stages.finetune.recipe import Recipe

logger = get_logger("finetune")


def decide_sharding(
    wanted: str,
    recipe: Recipe,
    base: Path,
    config: Any,
    examples: Sequence[Encoded],
    checkpointing: bool | str,
) -> bool:
    """Return whether the processes share one model; all decide alike.

    Args:
        wanted: `finetune.sharding`.
        examples: all rows; the longest decide what a batch takes.
        checkpointing: `finetune.gradient_checkpointing`; where it may be, it comes before sharing.
    """
    processes = count_processes()
    if wanted == "none":
        return False
    if processes == 1:
        if wanted == "full":
            logger.warning("finetune.sharding is full, and one process has nobody to share the model with")
        return False
    if wanted == "full":
        return True
    needed = estimate_whole(recipe, base, config, examples, processes, checkpointing is not False)
    _, free = read_device_memory(pick_device())
    if all_agree(needed <= free):
        return False
    what = f"training takes about {format_bytes(needed)} on each device, and {format_bytes(free)} are free"
    if recipe.method not in SHARDED_METHODS:
        logger.warning("%s: %s", what, describe_unsharded())
        return False
    logger.info("%s: %d processes share the model (finetune.sharding)", what, processes)
    return True


def estimate_whole(
    recipe: Recipe,
    base: Path,
    config: Any,
    examples: Sequence[Encoded],
    processes: int,
    checkpointing: bool,
) -> int:
    """Return about how many bytes one process takes that has the whole model, before it is loaded.

    For an architecture of which only the weights can be counted, without what a batch takes.
    """
    element_bytes = pick_dtype(pick_device(), recipe.dtype).itemsize
    weights = count_parameters(base)
    replaced = _count_replaced(recipe, config)
    rank = recipe.rank if recipe.method in LORA_METHODS else 0
    rows = min(-(-recipe.batch_size // processes), len(examples))
    longest = max(len(example.input_ids) for example in examples)
    learned = max(example.learned_count for example in examples)
    batch = Batch(rows, longest, learned)
    try:
        found = read_json(base / "config.json")
        return estimate_training_memory(
            found, weights, rank, batch, element_bytes, replaced, is_averaged=True
        )
    except KeyError:
        return count_state_bytes(weights, replaced, element_bytes, replaced > 0, is_averaged=True)


def _count_replaced(recipe: Recipe, config: Any) -> int:
    if recipe.method not in REPLACED_METHODS:
        return 0
    model = make_empty(config)
    chosen = select_weights(model, recipe.trained_modules if recipe.method == "partial" else None)
    return sum(model.get_parameter(name).numel() for name in chosen)
