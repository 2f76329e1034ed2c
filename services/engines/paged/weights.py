"""The weights of a GGUF file of a Llama, as arrays."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.engines.paged.gguf_file import GgufFile, read_file
from services.engines.protocol import EngineError
from stages.common.errors import InputError


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama; `heads` share the keys and values of `kv_heads`."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    rope_base: float
    norm_epsilon: float


@dataclass(frozen=True, slots=True)
class Weights:
    """A Llama's sizes and its tensors by their GGUF names, rows first: [outputs, inputs].

    Halves of the rotary embedding lie side by side as in Hugging Face's checkpoints, not interleaved as in
    llama.cpp's.
    """

    shape: Shape
    tensors: dict[str, NDArray[Any]]


def read_gguf(path: Path) -> Weights:
    """Read a Llama from a GGUF file.

    Raises:
        InputError: the file is not there, or is not GGUF.
        EngineError: it holds another architecture.
    """
    try:
        file = read_file(path)
    except (ValueError, OSError) as error:
        raise InputError(
            f"{path} cannot be read: {error}",
            "make it anew (dvc repro export), or choose another engine (services.engine.kind)",
        ) from error
    shape = _shape(file)
    tensors = dict(file.tensors)
    for name, array in tensors.items():
        if name.endswith("attn_q.weight"):
            tensors[name] = _side_by_side(array, shape.heads)
        elif name.endswith("attn_k.weight"):
            tensors[name] = _side_by_side(array, shape.kv_heads)
    return Weights(shape, tensors)


def _shape(file: GgufFile) -> Shape:
    if (architecture := file.values.get("general.architecture")) != "llama":
        raise EngineError(f"the paged engine computes Llama models, and this one is of {architecture!r}")
    values = {key.removeprefix("llama."): value for key, value in file.values.items()}
    hidden, heads = values["embedding_length"], values["attention.head_count"]
    return Shape(
        layers=values["block_count"],
        hidden=hidden,
        heads=heads,
        kv_heads=values.get("attention.head_count_kv", heads),
        head_dim=values.get("rope.dimension_count", hidden // heads),
        vocabulary=len(file.tensors["token_embd.weight"]),
        context=values["context_length"],
        rope_base=values.get("rope.freq_base", 10_000.0),
        norm_epsilon=values["attention.layer_norm_rms_epsilon"],
    )


def _side_by_side(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Undo llama.cpp's interleaving of the two halves that rotate together."""
    halves = rows.reshape(heads, rows.shape[0] // heads // 2, 2, rows.shape[1]).swapaxes(1, 2)
    return np.ascontiguousarray(halves).reshape(rows.shape)
