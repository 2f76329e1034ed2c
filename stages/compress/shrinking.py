"""Leave out what a model needs least: whole blocks, channels of the feed-forward layers, or tokens.

What is needed is measured on training rows. A block that hardly changes the direction of its input is needed
least (Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
arXiv:2403.03853). A channel counts by the size of its activations times that of its column in the layer after
it, as weights do in Wanda (Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language
Models", ICLR).

The smaller model is built from a configuration of its own, so that no size, no cache and no number of a layer
is left from the larger one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from stages.common.model.blocks import FEED_FORWARD, find_feed_forward
from stages.common.model.replaced import list_blocks

CHANNELS = 32  # kept channels are a multiple: the blocks of a quantization divide the rows

Tensor = Any  # torch.Tensor, which is imported only where it is needed


def drop_blocks(model: Any, rows: Sequence[list[int]], share: float) -> tuple[Any, list[int]]:
    """Return a model of a share of the blocks, at least one, and the numbers of those that are left.

    Args:
        rows: token ids of training rows.
    """
    names = list_blocks(model)
    count = max(1, round(share * len(names)))
    influence = measure_influence(model, [model.get_submodule(name) for name in names], rows)
    kept = sorted(sorted(range(len(names)), key=lambda number: -influence[number])[:count])
    stem = names[0].rpartition(".")[0]
    state = {}
    places = {f"{stem}.{old}.": f"{stem}.{new}." for new, old in enumerate(kept)}
    for key, tensor in model.state_dict().items():
        block = ".".join(key.split(".")[: stem.count(".") + 2]) + "."
        if not key.startswith(f"{stem}."):
            state[key] = tensor
        elif block in places:
            state[places[block] + key.removeprefix(block)] = tensor
    config = _change_config(model.config, num_hidden_layers=count)
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == len(names):
            setattr(config, name, value[:count])
    return _build(model, config, state), kept


def measure_influence(model: Any, blocks: Sequence[Any], rows: Sequence[list[int]]) -> list[float]:
    """Return for each block 1 minus the mean cosine between its input and its output, over all tokens."""
    import torch

    sums, tokens = [0.0] * len(blocks), 0

    def compare(number: int) -> Callable[[Any, Any, Any], None]:
        def hook(_block: Any, arguments: Any, output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            sums[number] += float(torch.cosine_similarity(arguments[0].float(), after.float(), dim=-1).sum())

        return hook

    with _hooked([block.register_forward_hook(compare(n)) for n, block in enumerate(blocks)]):
        for row in rows:
            _read(model, row)
            tokens += len(row)
    return [1.0 - total / tokens for total in sums]


def drop_channels(model: Any, rows: Sequence[list[int]], share: float) -> tuple[Any, int]:
    """Return a model with a share of the feed-forward channels of each block, and how many that is.

    Args:
        rows: token ids of training rows.
    """
    import torch

    names = list_blocks(model)
    parts = [f"{name}.{find_feed_forward(model.get_submodule(name))}" for name in names]
    width = int(model.config.intermediate_size)
    count = min(width, max(CHANNELS, round(share * width / CHANNELS) * CHANNELS))
    sizes = measure_activations(model, [model.get_submodule(f"{part}.down_proj") for part in parts], rows)
    state = dict(model.state_dict())
    for part, size in zip(parts, sizes, strict=True):
        importance = size * state[f"{part}.down_proj.weight"].float().norm(dim=0)
        kept = torch.sort(torch.topk(importance, count).indices).values
        for layer in FEED_FORWARD:
            weight, bias = f"{part}.{layer}.weight", f"{part}.{layer}.bias"
            if layer == "down_proj":
                state[weight] = state[weight][:, kept]
                continue
            state[weight] = state[weight][kept]
            if bias in state:
                state[bias] = state[bias][kept]
    return _build(model, _change_config(model.config, intermediate_size=count), state), count


def measure_activations(model: Any, layers: Sequence[Any], rows: Sequence[list[int]]) -> list[Tensor]:
    """Return for each layer the root of the sum of squares of each input, over all tokens."""
    import torch

    sums = [torch.zeros(layer.in_features) for layer in layers]

    def add(number: int) -> Callable[[Any, Any], None]:
        def hook(_layer: Any, arguments: Any) -> None:
            sums[number] += arguments[0].float().square().flatten(0, -2).sum(dim=0)

        return hook

    with _hooked([layer.register_forward_pre_hook(add(n)) for n, layer in enumerate(layers)]):
        for row in rows:
            _read(model, row)
    return [total.sqrt() for total in sums]


def keep_tokens(model: Any, kept: Sequence[int]) -> Any:
    """Return a model that knows only these tokens, each by its place among them."""
    import torch

    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if any(module is layer for layer in layers)]
    state, rows = dict(model.state_dict()), torch.tensor(kept)
    for key in [f"{name}.{part}" for name in names for part in ("weight", "bias")]:
        if key in state:
            state[key] = state[key][rows]
    places = {old: new for new, old in enumerate(kept)}
    config = _change_config(model.config, vocab_size=len(kept), **_renumber_ids(model.config, places))
    smaller = _build(model, config, state)
    for name, value in _renumber_ids(smaller.generation_config, places).items():
        setattr(smaller.generation_config, name, value)
    return smaller


def list_token_ids(model: Any) -> set[int]:
    """Return the ids of the tokens that the settings of a model name."""
    found = [*_read_ids(model.config).values(), *_read_ids(model.generation_config).values()]
    return {number for value in found for number in (value if isinstance(value, list) else [value])}


def _read_ids(config: Any) -> dict[str, int | list[int]]:
    return {n: v for n, v in config.to_dict().items() if n.endswith("_token_id") and v is not None}


def _renumber_ids(config: Any, places: Mapping[int, int]) -> dict[str, int | list[int] | None]:
    """Return the ids in a configuration as they are now; one of no token that is left is None."""
    return {
        name: [places[n] for n in value if n in places] if isinstance(value, list) else places.get(value)
        for name, value in _read_ids(config).items()
    }


@contextmanager
def _hooked(hooks: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _read(model: Any, row: list[int]) -> None:
    import torch

    with torch.inference_mode():
        model.get_decoder()(input_ids=torch.tensor([row]), use_cache=False)


def _change_config(config: Any, **changes: Any) -> Any:
    changed = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def _build(model: Any, config: Any, state: dict[str, Tensor]) -> Any:
    """Return a model of a configuration with these weights; tied ones stay tied."""
    smaller = type(model)(config).to(model.dtype).eval()
    smaller.load_state_dict(state)
    smaller.tie_weights()
    smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller
