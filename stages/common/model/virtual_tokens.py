"""Learned virtual tokens before every text (methods prompt_tuning and prefix_tuning), which peft trains.

They are no weights that could be merged. What they are is a beginning of the cache of keys and values: that
of the prompt's embeddings, or the learned keys and values themselves. So a model is asked behind them by
beginning with `begin_cache` instead of an empty cache; positions and the mask count them as tokens.
`read_behind` lets the model itself put them first where it is called without a cache, as in training.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial, update_wrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.common.errors import InputError

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

PREFIX = "prefix_tuning"


def has_virtual_tokens(model: Any) -> bool:
    """Return whether a model puts virtual tokens before every text."""
    return count_virtual_tokens(model) > 0


def count_virtual_tokens(model: Any) -> int:
    """Return how many virtual tokens a model puts before every text."""
    settings = _find_settings(model)
    return int(settings.num_virtual_tokens) if settings is not None else 0


def count_computed_tokens(model: Any) -> int:
    """Return how many of them go through the layers: those of prefix tuning are what layers would make."""
    return 0 if has_prefix(model) else count_virtual_tokens(model)


def count_values(config: Any, method: str) -> int:
    """Return how many numbers a virtual token has: an embedding, or keys and values for every layer.

    Args:
        config: of the base model.
    """
    if method != PREFIX:
        return int(config.get_text_config().hidden_size)
    layers, heads, head = _read_shape(config)
    return layers * 2 * heads * head


def _read_shape(config: Any) -> tuple[int, int, int]:
    """Return the layers of a model, and the heads of keys and their size, as peft reads a configuration."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    return int(text.num_hidden_layers), int(getattr(text, "num_key_value_heads", None) or heads), int(head)


def check_keys(model: Any, method: str) -> None:
    """Check that all layers of a base model have keys and values, for prefix tuning of the shape it says.

    Args:
        model: with or without values (torch's device `meta`).

    Raises:
        InputError: the method cannot train such a model.
    """
    import torch

    try:
        with torch.no_grad():
            cache = model(torch.zeros((1, 1), dtype=torch.long, device=model.device), use_cache=True)
    except RuntimeError:
        # Without values some cannot be computed: GPT-2 looks for padding in the ids, and torch has no shapes
        # of a mixture's products in float32. The loaded model is asked again.
        if model.device.type != "meta":
            raise
        return
    shapes = [getattr(layer, "keys", None) for layer in getattr(cache.past_key_values, "layers", ())]
    found = {(int(keys.shape[1]), int(keys.shape[3])) for keys in shapes if keys is not None}
    layers, *wanted = _read_shape(model.config)
    if len(shapes) != layers or any(keys is None for keys in shapes):
        raise InputError(
            f"finetune.method is {method}, and not every layer of {type(model).__name__} has keys and values",
            "set finetune.method: lora, or choose another base model",
        )
    if method == PREFIX and found != {tuple(wanted)}:
        raise InputError(
            f"finetune.method is {method}, and the heads and sizes of the keys of {type(model).__name__}, "
            f"{sorted(found)}, are not as its configuration says, {tuple(wanted)}",
            "set finetune.method: prompt_tuning or lora, or choose another base model",
        )


def check_count(positions: int | None, count: int) -> None:
    """Check that the positions of a model are more than its virtual tokens.

    Raises:
        InputError: with both.
    """
    if positions is not None and count >= positions:
        raise InputError(
            f"finetune.num_virtual_tokens is {count}, and the base model has {positions} positions: none is "
            "left for text",
            "set finetune.num_virtual_tokens to a few tokens, such as 20",
        )


def check_init_text(tokenizer: Any, text: str, count: int) -> None:
    """Check that the text from which virtual tokens are initialized has no more tokens than they are.

    peft would cut it, and says nothing; a shorter one is repeated.

    Raises:
        InputError: with its tokens.
    """
    tokens = len(tokenizer(text)["input_ids"])
    if not tokens or tokens > count:
        raise InputError(
            f"finetune.prompt_tuning_init_text has {tokens} tokens, and finetune.num_virtual_tokens is "
            f"{count}",
            f"set finetune.num_virtual_tokens: {tokens}, or shorten the text" if tokens else "write a text",
        )


def check_shape(config: Any, settings: Mapping[str, Any], adapter: Path) -> None:
    """Check that the virtual tokens of an adapter are as wide as those of this base model.

    Args:
        settings: from `stages.common.model.adapter.read_settings`.

    Raises:
        InputError: with the shapes.
    """
    from safetensors import safe_open

    path = adapter / "adapter_model.safetensors"
    with safe_open(path, framework="numpy") as file:
        found = tuple(file.get_slice("prompt_embeddings").get_shape())
    wanted = (settings["num_virtual_tokens"], count_values(config, settings["method"]))
    if found != wanted:
        raise InputError(
            f"{path} does not fit the base model: its virtual tokens are {found} there and {wanted} here",
            "fetch the base model that it was trained on, or train again: dvc repro finetune",
        )


def read_behind(model: PeftModel) -> PeftModel:
    """Let a model with virtual tokens read behind them, however it is called; return it.

    peft's own forward pass drops the positions of tokens, injects the virtual ones again behind a cache that
    has them already, and returns their logits with those of the text.
    """
    # A partial, not a closure: a copy of the model gets a forward pass of its own.
    model.forward = update_wrapper(partial(_forward, model), type(model).forward)
    return model


def begin_cache(model: Any, rows: int) -> Any:
    """Return a cache that begins with the virtual tokens, for so many rows; None for a model without them."""
    from transformers import DynamicCache

    if not has_virtual_tokens(model):
        return None
    prompt = model.get_prompt(1)
    if not has_prefix(model):
        base = model.get_base_model()
        embeddings = prompt.to(base.get_input_embeddings().weight.dtype)
        prompt = base(
            inputs_embeds=embeddings, past_key_values=DynamicCache(), use_cache=True
        ).past_key_values
    # Layers without windows, whatever the model's own are: engines pad and join them, and masks hide.
    cache = DynamicCache()
    for number, layer in enumerate(prompt.layers):
        shape = (rows, -1, -1, -1)
        cache.update(layer.keys.expand(shape), layer.values.expand(shape), number)
    return cache


def _forward(
    model: PeftModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    **settings: Any,
) -> Any:
    """Read token ids behind the virtual tokens; logits, positions and mask are those of the ids alone.

    With a cache, which begins with the virtual tokens, positions and mask count them.
    """
    base = model.get_base_model()
    if past_key_values is not None:
        return base(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **settings,
        )
    if position_ids is None:  # texts that begin at the first place: peft's own way
        output = type(model).forward(model, input_ids=input_ids, attention_mask=attention_mask, **settings)
        output.logits = output.logits[:, -input_ids.shape[1] :]
        return output
    return _read_at(model, base, input_ids, attention_mask, position_ids, settings)


def _read_at(
    model: PeftModel,
    base: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    settings: dict[str, Any],
) -> Any:
    import torch

    rows, count = len(input_ids), count_virtual_tokens(model)
    position_ids = position_ids + count
    if attention_mask is not None:
        attention_mask = torch.cat([attention_mask.new_ones(rows, count), attention_mask], dim=1)
    common = {"attention_mask": attention_mask, **settings}
    if has_prefix(model):
        return base(
            input_ids=input_ids, position_ids=position_ids, past_key_values=begin_cache(model, rows), **common
        )
    words = base.get_input_embeddings()(input_ids)
    virtual = torch.arange(count, device=input_ids.device).expand(rows, -1)
    if isinstance(kept := common.get("logits_to_keep"), torch.Tensor):
        common["logits_to_keep"] = kept + count
    if "prefix_length" in common:  # of rows in one sequence, which all see the virtual tokens
        common["prefix_length"] += count
    output = base(
        inputs_embeds=torch.cat([model.get_prompt(rows).to(words.dtype), words], dim=1),
        position_ids=torch.cat([virtual, position_ids], dim=1),
        **common,
    )
    if kept is None:
        output.logits = output.logits[:, count:]
    return output


def _find_settings(model: Any) -> Any:
    """Return peft's settings of virtual tokens; None for a model without them."""
    found = getattr(model, "peft_config", None) or {}
    settings = found.get("default") if isinstance(found, dict) else None
    return settings if settings is not None and settings.is_prompt_learning else None


def has_prefix(model: Any) -> bool:
    """Return whether these are keys and values that layers find in a cache (prefix tuning)."""
    settings = _find_settings(model)
    return settings is not None and settings.peft_type.lower() == PREFIX
