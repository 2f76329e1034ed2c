"""Many rows as one sequence, their common beginning computed once.

Rows of one task begin with the same tokens: the system prompt and the head of the chat template. The
tokens of a batch are laid out as one sequence,

    prefix | rest of row 1, padded | rest of row 2, padded | ...

in which every rest sees the prefix and itself. Where attention takes packed rows, there is no padding
(`kernels/packed.py`). Position numbers start again behind the prefix, so each row has exactly the states, and
the adapter exactly the gradients, that it would have alone.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stages.common.chat.common_prefix import count_common_prefix
from stages.common.chat.template import Encoded
from stages.finetune.kernels.packed import Packing, attend_without_scores, find_window, pack

ATTENTION = "perennial_shared_prefix"
_TENSORS = ("input_ids", "position_ids", "attention_mask", "answer_positions", "targets")


@dataclass(frozen=True, slots=True)
class Layout:
    """A batch, as one sequence or (where the model cannot share a prefix) as padded rows.

    Attributes:
        input_ids: shape (1, prefix + rows * width), or (rows, width).
        position_ids: of the same shape, or None for padded rows.
        attention_mask: of the same shape, or None for one sequence.
        answer_positions: places in the flattened batch whose output predicts an answer's token.
        targets: those tokens, as many as `answer_positions`.
        prefix_length: tokens at the front that all rows share.
        rows: how many rows follow.
        packing: where each begins and ends, if they have no padding.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    attention_mask: Tensor | None
    answer_positions: Tensor
    targets: Tensor
    prefix_length: int
    rows: int
    packing: Packing | None = None

    def to(self, device: torch.device, **how: Any) -> Layout:
        """Return the same batch on a device."""
        moved = {
            name: value.to(device, **how)
            for name in (*_TENSORS, "packing")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)

    def without_targets(self) -> Layout:
        """Return the same batch with nothing to predict."""
        return replace(self, answer_positions=self.answer_positions[:0], targets=self.targets[:0])

    def answer_logits(self, model: Any) -> Tensor:
        """Return the model's logits for the answers' tokens only, shape (answer tokens, words)."""
        logits: Tensor
        if self.attention_mask is not None:
            output = model(input_ids=self.input_ids, attention_mask=self.attention_mask, use_cache=False)
            logits = output.logits.flatten(0, 1)[self.answer_positions]
        else:
            rows = {"prefix_length": self.prefix_length, "rows": self.rows}
            logits = model(
                input_ids=self.input_ids,
                position_ids=self.position_ids,
                use_cache=False,
                logits_to_keep=self.answer_positions,
                **({"packing": self.packing} if self.packing else rows),
            ).logits[0]
        return logits


def lay_out(
    examples: Sequence[Encoded], pad_id: int, share_prefix: bool = True, packed: bool = False
) -> Layout:
    """Lay out a batch of examples, as one sequence or as padded rows.

    Args:
        packed: the one sequence has no padding.
    """
    if packed:
        return _lay_out_packed(examples)
    prefix = _common_prefix(examples) if share_prefix else 0
    width = max(len(example.input_ids) for example in examples) - prefix
    ids = list(examples[0].input_ids[:prefix])
    mask: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    for row, example in enumerate(examples):
        rest = example.input_ids[prefix:]
        padding = width - len(rest)
        ids += rest + [pad_id] * padding
        mask += [1] * len(rest) + [0] * padding
        for start, end in example.learned:
            # The output at one token predicts the next.
            positions += range(row * width + start - 1, row * width + end - 1)
            targets += example.input_ids[start:end]
    places = torch.arange(prefix + width)
    row_places = torch.cat([places[:prefix], places[prefix:].repeat(len(examples))])
    shape = (1, -1) if share_prefix else (len(examples), width)
    return Layout(
        input_ids=torch.tensor(ids).view(shape),
        position_ids=row_places.view(shape) if share_prefix else None,
        attention_mask=None if share_prefix else torch.tensor(mask).view(shape),
        answer_positions=torch.tensor(positions),
        targets=torch.tensor(targets),
        prefix_length=prefix,
        rows=len(examples),
    )


def _lay_out_packed(examples: Sequence[Encoded]) -> Layout:
    prefix = _common_prefix(examples)
    ids, places = list(examples[0].input_ids[:prefix]), list(range(prefix))
    positions: list[int] = []
    targets: list[int] = []
    for example in examples:
        before = len(ids) - prefix  # tokens of this row are so many places further than in the row alone
        for start, end in example.learned:
            positions += range(before + start - 1, before + end - 1)
            targets += example.input_ids[start:end]
        ids += example.input_ids[prefix:]
        places += range(prefix, len(example.input_ids))
    return Layout(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([places]),
        attention_mask=None,
        answer_positions=torch.tensor(positions),
        targets=torch.tensor(targets),
        prefix_length=prefix,
        rows=len(examples),
        packing=pack(prefix, [len(example.input_ids) - prefix for example in examples]),
    )


def _common_prefix(examples: Sequence[Encoded]) -> int:
    """Return how many tokens all prompts begin with; each keeps at least one token of its prompt."""
    limit = min(example.prompt_length for example in examples) - 1
    return min(limit, count_common_prefix(example.input_ids[:limit] for example in examples))


def can_share_prefix(model: Any) -> bool:
    """Return whether a transformers model takes our attention: an exchangeable one, over all or a window."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        bool(getattr(type(model), "_supports_attention_backend", False))
        and "logits_to_keep" in inspect.signature(model.forward).parameters
        and kinds <= {"full_attention", "sliding_attention"}
        and not getattr(config, "attention_dropout", 0.0)
        and not getattr(config, "attn_pdrop", 0.0)
    )


def use_shared_prefix(model: Any) -> None:
    """Make a transformers model attend as in `Layout`; `prefix_length` and `rows` go to its forward."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, shared_prefix_attention)
    model.set_attn_implementation(ATTENTION)


def shared_prefix_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prefix_length: int,
    rows: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within the prefix, and from each row to the prefix and itself.

    Args:
        query: shape (1, heads, tokens, head size); key and value have as many heads, or fewer
            (each then serves several heads of the query). More keys than queries are those of virtual tokens
            in front, which all see.
        sliding_window: tokens that a token attends to, itself included; None for all.
        softcap: a bound of the scores.

    Returns:
        shape (1, tokens, heads, head size).
    """
    scale = scaling if scaling is not None else 1.0 / math.sqrt(query.shape[-1])
    attend = partial(_causal, window=sliding_window or find_window(module), softcap=softcap)
    shared = prefix_length + key.shape[2] - query.shape[2]  # keys that all rows see
    parts = []
    if prefix_length:
        head = query[:, :, :prefix_length]
        parts.append(attend(head * scale, key[:, :, :shared], value[:, :, :shared]).transpose(1, 2))
    rest = [_by_row(query, prefix_length, rows), *(_by_row(states, shared, rows) for states in (key, value))]
    if shared:
        rest[1:] = [
            torch.cat([states[:, :, :shared].expand(rows, -1, -1, -1), own], dim=2)
            for states, own in zip((key, value), rest[1:], strict=True)
        ]
    parts.append(attend(rest[0] * scale, rest[1], rest[2]).transpose(1, 2).flatten(0, 1)[None])
    return torch.cat(parts, dim=1), None


def _by_row(states: Tensor, prefix_length: int, rows: int) -> Tensor:
    """Return the states behind the prefix, shape (rows, heads, width, head size)."""
    behind: Tensor = states[0, :, prefix_length:].unflatten(1, (rows, -1))
    return behind.transpose(0, 1)


def _causal(query: Tensor, key: Tensor, value: Tensor, window: int | None, softcap: float | None) -> Tensor:
    """Return causal attention of queries at the end of the keys, on a CPU by plain products.

    There, `scaled_dot_product_attention` in bfloat16 takes nine times as long backward. On a GPU it is faster
    and keeps no scores, but takes no bound of them.
    """
    if query.device.type == "cuda" and softcap is None:
        return attend_without_scores(query, key, value, 1.0, window)
    rows, heads, width, size = query.shape
    keys, groups = key.shape[2], key.shape[1]
    # Heads that share a key go through one product.
    grouped = query.reshape(rows, groups, -1, size)
    scores: Tensor = torch.matmul(grouped, key.transpose(-1, -2))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    hidden = torch.ones(width, keys, dtype=torch.bool, device=query.device).triu(keys - width + 1)
    if window is not None and window < keys:
        hidden |= torch.ones_like(hidden).tril(keys - width - window)
    weights = torch.softmax(
        scores.view(rows, heads, width, keys) + _minus_infinity_at(hidden, scores.dtype), dim=-1
    )
    mixed: Tensor = torch.matmul(weights.view(rows, groups, -1, keys), value)
    return mixed.view(rows, heads, width, size)


def _minus_infinity_at(places: Tensor, dtype: torch.dtype) -> Tensor:
    zeros: Tensor = torch.zeros(places.shape, dtype=dtype, device=places.device)
    return zeros.masked_fill_(places, float("-inf"))
