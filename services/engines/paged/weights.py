"""The weights of a GGUF file of a Llama, as arrays."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise InputError(
            f"{path} cannot be read: {error}",
            "make it anew (dvc repro export), or choose another engine (services.engine.name)",
        ) from error
    shape = _shape(reader)
    tensors = {tensor.name: _values(tensor) for tensor in reader.tensors}
    for name, array in tensors.items():
        if name.endswith("attn_q.weight"):
            tensors[name] = _side_by_side(array, shape.heads)
        elif name.endswith("attn_k.weight"):
            tensors[name] = _side_by_side(array, shape.kv_heads)
    return Weights(shape, tensors)


def _shape(reader: Any) -> Shape:
    def field(name: str, otherwise: Any = None) -> Any:
        found = reader.get_field(name)
        return otherwise if found is None else found.contents()

    if (architecture := field("general.architecture")) != "llama":
        raise EngineError(f"the paged engine computes Llama models, and this one is of {architecture!r}")
    hidden, heads = field("llama.embedding_length"), field("llama.attention.head_count")
    return Shape(
        layers=field("llama.block_count"),
        hidden=hidden,
        heads=heads,
        kv_heads=field("llama.attention.head_count_kv", heads),
        head_dim=field("llama.rope.dimension_count", hidden // heads),
        vocabulary=next(len(t.data) for t in reader.tensors if t.name == "token_embd.weight"),
        context=field("llama.context_length"),
        rope_base=field("llama.rope.freq_base", 10_000.0),
        norm_epsilon=field("llama.attention.layer_norm_rms_epsilon"),
    )


def _values(tensor: Any) -> NDArray[Any]:
    """Return a tensor as F16 or F32; quantized ones are unpacked to F32."""
    from gguf.quants import dequantize

    if tensor.data.dtype in (np.float16, np.float32):
        values: NDArray[Any] = np.array(tensor.data)  # the runtime wants writeable memory
        return values
    return dequantize(tensor.data, tensor.tensor_type)


def _side_by_side(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Undo llama.cpp's interleaving of the two halves that rotate together."""
    halves = rows.reshape(heads, rows.shape[0] // heads // 2, 2, rows.shape[1]).swapaxes(1, 2)
    return np.ascontiguousarray(halves).reshape(rows.shape)
