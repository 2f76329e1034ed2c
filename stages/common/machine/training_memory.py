"""About how much memory a training takes, from the base model's configuration, before anything is loaded.

For LoRA, or training the weights themselves, on a decoder with gated feed-forward layers, whose tensors it
adds up one by one. `finetune` counts those of the loaded model, whatever its architecture, before the first
step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.common.model.adapter import SHARDED_METHODS

PROGRAM_BYTES = 690 << 20  # Python with torch, transformers and peft, measured
# The code that oneDNN and torch compile for the products of bfloat16 on a CPU for each length of a batch, and
# of how many lengths they keep it: measured with a Llama's layers (docs/benchmarks.md, Memory of a training).
KERNEL_BYTES, LENGTHS_KEPT = 11 << 20, 23
TRAINED_BYTES = 16  # of a trained weight in float32, its gradient and AdamW's two averages
BUCKET_BYTES = 4  # and of its gradient again, where several processes average theirs
LOGITS_AT_ONCE = 128  # rows that the loss widens to float32, twice


@dataclass(frozen=True, slots=True)
class Batch:
    """The largest batch: rows, tokens of the longest row, and tokens of the longest answer."""

    rows: int
    longest: int
    longest_answer: int


def list_ways(
    sharding: str, checkpointing: bool | str, processes: int, method: str
) -> list[tuple[int, bool]]:
    """Return in how many parts a model may be, and whether layers are computed twice: faster ways first.

    Args:
        sharding, checkpointing, method: of `finetune`.
    """
    can_share = processes > 1 and method in SHARDED_METHODS
    parts = {"none": [1], "full": [processes], "auto": [1, processes]}[sharding] if can_share else [1]
    twice = [False, True] if checkpointing == "auto" else [bool(checkpointing)]
    return [(shards, again) for shards in parts for again in twice]


def count_kernel_bytes(element_bytes: int, device: str, batches: int) -> int:
    """Return the bytes of the code of products that a training of so many batches keeps at most.

    Args:
        element_bytes: of a number in the format of training.
        device: as torch names it.
    """
    return KERNEL_BYTES * min(batches, LENGTHS_KEPT) if device == "cpu" and element_bytes == 2 else 0


def count_gathered_bytes(weights: int, outside: int, layers: int, element_bytes: int, replaced: bool) -> int:
    """Return the bytes of the whole weights that are in memory at once where processes share a model.

    Those outside the blocks, and two blocks: the one that computes and the next. Where the weights themselves
    are trained, the gradients of one group of weights too, before and after they are widened.

    Args:
        weights: how many the base model has, `outside` of them in no block.
    """
    block = (weights - outside) // layers
    gradients = max(block, outside) * (element_bytes + 4) if replaced else 0
    return (outside + 2 * block) * element_bytes + gradients


def count_state_bytes(
    weights: int, trained: int, element_bytes: int, replaced: bool, is_averaged: bool = False
) -> int:
    """Return the bytes of a model's weights, and of gradients and averages of what is trained.

    Args:
        weights: how many the base model has.
        element_bytes: of a number in the format of training.
        replaced: whether the trained weights are some of the base model's; they are float32, with a copy in
            the format of training during a step.
        is_averaged: whether the gradients are averaged with those of other processes.
    """
    frozen = weights - trained if replaced else weights
    copies = trained if replaced and element_bytes < 4 else 0
    each = TRAINED_BYTES + (BUCKET_BYTES if is_averaged else 0)
    return (frozen + copies) * element_bytes + trained * each


def estimate_training_memory(
    config: Mapping[str, Any],
    weights: int,
    rank: int,
    batch: Batch,
    element_bytes: int,
    replaced: int = 0,
    is_averaged: bool = False,
    checkpointing: bool = False,
    shards: int = 1,
) -> int:
    """Return the most bytes that one process of a training holds at once.

    Args:
        config: as in the model's config.json.
        weights: how many the base model has.
        rank: of LoRA; 0 where little is added, such as virtual tokens.
        element_bytes: of a number in the format of training.
        batch: of this process.
        replaced: how many of the base model's weights are trained themselves, without an adapter.
        is_averaged: whether the gradients are averaged with those of other processes.
        checkpointing: whether layers keep their inputs only, and are computed again in the backward pass.
        shards: processes that share the model.

    Raises:
        KeyError: the configuration has other names: it is of another architecture.
    """
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, words = config["num_attention_heads"], config["vocab_size"]
    head = config.get("head_dim") or hidden // heads
    queries, keys = heads * head, (config.get("num_key_value_heads") or heads) * head
    # Sums of the inputs and outputs of the seven linear layers.
    sides = (
        (hidden + queries)
        + 2 * (hidden + keys)
        + (queries + hidden)
        + 2 * (hidden + inner)
        + (inner + hidden)
    )
    adapter = layers * rank * sides
    # Two norms and what they are of, queries and what attention makes of them, keys and values, the four of
    # the feed-forward layer, the seven of the adapter, and how much each token looks at the others.
    rank = 0 if replaced else rank
    each_token = 4 * hidden + 2 * queries + 2 * keys + 4 * inner + 7 * rank + heads * batch.longest
    tokens = batch.rows * batch.longest
    logits = batch.rows * batch.longest_answer * words * element_bytes + 2 * 4 * LOGITS_AT_ONCE * words
    kept = layers * hidden + each_token if checkpointing else layers * each_token
    activations = tokens * kept * element_bytes
    if shards > 1:
        outside = words * hidden * (1 if config.get("tie_word_embeddings", True) else 2)
        # A part is never widened: what is computed with is gathered.
        frozen = weights - replaced
        state = (frozen * element_bytes + (replaced or adapter) * TRAINED_BYTES) // shards
        state += count_gathered_bytes(weights, outside, layers, element_bytes, replaced > 0)
    else:
        state = count_state_bytes(weights, replaced or adapter, element_bytes, replaced > 0, is_averaged)
    return int(PROGRAM_BYTES + state + activations + logits)
