"""Whether blocks of a model, channels of them, or tokens can be left out (variants of another shape)."""

from __future__ import annotations

from typing import Any

from stages.common.errors import InputError
from stages.common.model.replaced import list_blocks

FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def check_shrinkable(config: Any, variant: str, model: Any) -> None:
    """Check that a model can be made smaller by a variant.

    Args:
        variant: `fewer_layers`, `pruned` or `small_vocabulary`.
        model: of the configuration; its weights may be without values (torch's device `meta`).

    Raises:
        InputError: it reads pictures too, its blocks differ, or its feed-forward layers are of another kind.
    """
    fix = f"take {variant} out of compress.variants"
    if config.get_text_config() is not config:
        raise InputError(f"compress.variants has {variant}, and the base model reads more than text", fix)
    if variant == "fewer_layers" and (names := _list_differences(config)):
        raise InputError(
            f"compress.variants has {variant}, and the base model's blocks are not alike "
            f"({', '.join(names)}): without some of them the pattern is another",
            fix,
        )
    blocks = [model.get_submodule(name) for name in list_blocks(model)]
    if variant == "pruned" and not all(find_feed_forward(block) for block in blocks):
        raise InputError(
            f"compress.variants has {variant}, and the feed-forward layers of the base model are not "
            f"{', '.join(FEED_FORWARD)}",
            fix,
        )


def _list_differences(config: Any) -> list[str]:
    """Return the settings that have a value for each block, and not the same for all."""
    found = config.to_dict().items()
    return [
        name
        for name, value in found
        if isinstance(value, list) and len(value) == config.num_hidden_layers and len({*map(str, value)}) > 1
    ]


def find_feed_forward(block: Any) -> str | None:
    """Return the name of the module of a block that has the three layers."""
    for name, module in block.named_modules():
        if {child for child, _ in module.named_children()} >= {*FEED_FORWARD}:
            return str(name)
    return None
