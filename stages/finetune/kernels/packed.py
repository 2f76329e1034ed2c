"""Attention over rows of different lengths without padding, and without scores in memory.

The tokens of a batch are one sequence, as in `shared_prefix`, but the rests of the rows have no padding:

    prefix | rest of row 1 | rest of row 2 | ...

On a GPU the kernel is FlashAttention, which torch brings for sequences of different lengths. It reads
the keys of a row in one piece, so each row gets a copy of the prefix's keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import scaled_dot_product_attention

PACKED = "perennial_packed"
LARGEST_HEAD = 256  # values of a head that FlashAttention takes at most, in multiples of 8


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the sequences of a packed batch begin and end.

    Attributes:
        prefix: tokens that all rows share, which are the first sequence; 0: none is shared.
        rests: tokens of each row behind the prefix.
        query_starts: where each sequence begins among the tokens, and their number; int32.
        key_starts: the same among the keys, of which each row has those of the prefix, too.
        key_places: the token of each key.
        first_places: the key of each token; of the prefix's tokens, the first one.
        copy_places: the copies of the prefix's keys, row by row.
    """

    prefix: int
    rests: tuple[int, ...]
    query_starts: Tensor
    key_starts: Tensor
    key_places: Tensor
    first_places: Tensor
    copy_places: Tensor

    def to(self, device: torch.device, **how: Any) -> Packing:
        """Return the same on a device."""
        names = ("query_starts", "key_starts", "key_places", "first_places", "copy_places")
        return replace(self, **{name: getattr(self, name).to(device, **how) for name in names})

    def list_sequences(self) -> list[tuple[int, int]]:
        """Return the number of queries and of keys of each sequence."""
        rows = [(rest, self.prefix + rest) for rest in self.rests]
        return [(self.prefix, self.prefix), *rows] if self.prefix else rows


def pack(prefix: int, rests: Sequence[int]) -> Packing:
    """Return the packing of rows with so many tokens behind a prefix of so many."""
    shared = torch.arange(prefix)
    ends = list(accumulate(rests, initial=prefix))
    own = [torch.arange(start, start + rest) for start, rest in zip(ends, rests, strict=False)]
    key_places = torch.cat([shared, *(part for rest in own for part in (shared, rest))])
    key_ends = list(accumulate((prefix + rest for rest in rests), initial=prefix))
    starts = torch.tensor(key_ends[:-1])
    first = [torch.arange(end - rest, end) for end, rest in zip(key_ends[1:], rests, strict=True)]
    begin = [0] if prefix else []
    return Packing(
        prefix,
        tuple(rests),
        torch.tensor([*begin, *ends], dtype=torch.int32),
        torch.tensor([*begin, *key_ends], dtype=torch.int32),
        key_places,
        torch.cat([shared, *first]),
        (starts[:, None] + shared).flatten(),
    )


def can_pack(model: Any) -> bool:
    """Return whether FlashAttention computes what a model attends: on a GPU since Ampere, in 16 bits."""
    config = model.config.get_text_config()
    sizes = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    capped = getattr(config, "attn_logit_softcapping", None)
    return (
        model.device.type == "cuda"
        and torch.cuda.get_device_capability(model.device) >= (8, 0)
        and model.dtype in (torch.bfloat16, torch.float16)
        and sizes % 8 == 0
        and sizes <= LARGEST_HEAD
        and not capped
    )


def use_packed(model: Any) -> None:
    """Make a transformers model attend to packed batches; `packing` goes to its forward."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, packed_attention)
    model.set_attn_implementation(PACKED)


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within the prefix, and from each row to the prefix and itself.

    Args:
        query: shape (1, heads, tokens, head size); key and value have as many heads, or fewer.
        sliding_window: tokens that a token attends to, itself included; None for all.

    Returns:
        shape (1, tokens, heads, head size).
    """
    if key.shape[2] != query.shape[2]:
        raise ValueError("a packed batch has a key for each token, and no others in front")
    # Positions are float32 under autocasting, and so would queries and keys be; values are not.
    query, key, value = (states[0].transpose(0, 1).to(value.dtype) for states in (query, key, value))
    if packing.prefix:
        key, value = (_SpreadPrefix.apply(states, packing) for states in (key, value))
    scale = scaling if scaling is not None else 1.0 / math.sqrt(query.shape[-1])
    attend = _attend_on_gpu if query.device.type == "cuda" else _attend_one_by_one
    window = sliding_window or find_window(module)
    return attend(query, key, value, packing, scale, window)[None], None


class _SpreadPrefix(Function):
    """The keys of each sequence in one piece: those of the prefix are repeated for each row.

    The gradients of the copies are added in one fixed order, in float32.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return states.index_select(0, packing.key_places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        packing, prefix = ctx.packing, ctx.packing.prefix
        own = grads[0].index_select(0, packing.first_places)
        copies = grads[0].index_select(0, packing.copy_places).unflatten(0, (-1, prefix))
        own[:prefix] = (own[:prefix].float() + copies.sum(0, dtype=torch.float32)).to(own.dtype)
        return own, None


def _attend_on_gpu(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    sequences = packing.list_sequences()
    out = varlen_attn(
        query,
        key,
        value,
        packing.query_starts,
        packing.key_starts,
        max(queries for queries, _ in sequences),
        max(keys for _, keys in sequences),
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out


def _attend_one_by_one(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float, window: int | None
) -> Tensor:
    """Attend as on a GPU, for machines without one: one sequence after the other."""
    sequences = packing.list_sequences()
    queries = query.split([queries for queries, _ in sequences])
    keys, values = (states.split([keys for _, keys in sequences]) for states in (key, value))
    found = torch.cat(
        [
            attend_without_scores(_to_heads(q), _to_heads(k), _to_heads(v), scale, window)
            for q, k, v in zip(queries, keys, values, strict=True)
        ],
        dim=2,
    )
    return found[0].transpose(0, 1)


def _to_heads(states: Tensor) -> Tensor:
    return states.transpose(0, 1)[None]


def find_window(module: Any) -> int | None:
    """Return the window of a layer as transformers' masks have it; some models pass it by no argument."""
    config = getattr(module, "config", None)
    kinds, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds and layer is not None and kinds[layer] == "full_attention":
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def attend_without_scores(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
) -> Tensor:
    """Return causal attention of queries at the end of the keys by torch's kernels, which keep no scores.

    Args:
        query: shape (rows, heads, width, head size); key and value have as many heads, or fewer.
    """
    width, keys = query.shape[2], key.shape[2]
    # The kernels for GPUs take a mask only where every query has a key of its own.
    key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
    seen = torch.ones(width, keys, dtype=torch.bool, device=query.device).tril(keys - width)
    if window is not None and window < keys:
        seen &= torch.ones_like(seen).triu(keys - width - window + 1)
    return scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)
