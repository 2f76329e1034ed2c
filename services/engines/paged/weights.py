"""The weights of a decoder as arrays, from a GGUF file or from a folder of safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.engines.paged.gguf_file import read_file
from services.engines.paged.packed import Packed
from services.engines.protocol import EngineError
from services.engines.support import PAGED_TYPES, check_paged, describe_other
from stages.common.errors import InputError

# Those whose GGUF interleaves the halves of the rotary embedding.
_INTERLEAVED = ("llama", "smollm3", "granite")


@dataclass(frozen=True, slots=True)
class Rotation:
    """A rotary embedding: the base of its frequencies, and what divides them all."""

    base: float
    divisor: float = 1.0


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Sizes and constants of a decoder; groups of `heads` share keys and values (`kv_heads`).

    Attributes:
        rotations: of each layer; None in a layer without positions.
        gelu: whether the feed-forward layers have GELU, by tanh, in place of SiLU.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    norm_epsilon: float
    rotations: tuple[Rotation | None, ...]
    attention_scale: float
    embedding_scale: float
    residual_scale: float
    logit_divisor: float
    gelu: bool


@dataclass(frozen=True, slots=True)
class Weights:
    """A decoder's sizes and its tensors by GGUF name, rows first: [outputs, inputs]; an array or `Packed`.

    The halves of the rotary embedding are contiguous, as in Hugging Face's checkpoints, not interleaved as in
    llama.cpp. `rope_freqs.weight`, where there is one, divides its frequencies one by one.
    """

    shape: DecoderShape
    tensors: dict[str, Any]


def read_weights(path: Path) -> Weights:
    """Read a decoder from a GGUF file, or from a folder with its `config.json` and safetensors.

    Raises:
        InputError: the file or folder is missing, or cannot be read.
        EngineError: it has another architecture.
    """
    return read_safetensors(path) if path.is_dir() else read_gguf(path)


def read_gguf(path: Path) -> Weights:
    """Read a decoder from a GGUF file.

    Raises:
        InputError: the file is missing, or is not GGUF.
        EngineError: it has another architecture.
    """
    try:
        file = read_file(path)
    except (ValueError, OSError) as error:
        raise InputError(
            f"{path} cannot be read: {error}",
            "export it again (dvc repro export), or use another engine (services.engine.kind)",
        ) from error
    if (architecture := file.values.get("general.architecture")) not in PAGED_TYPES.values():
        raise EngineError(describe_other(architecture))
    return _build(file.values, dict(file.tensors))


def read_safetensors(folder: Path) -> Weights:
    """Read a decoder from a checkpoint of transformers; bfloat16 weights become float32.

    Raises:
        InputError: the folder has no checkpoint.
        EngineError: it has another architecture.
    """
    from stages.common.gguf.model import list_settings
    from stages.common.model.loading import read_config

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} contains no model", "fetch it again: dvc repro fetch_base")
    if (reason := check_paged(json.loads((folder / "config.json").read_text(encoding="utf-8")))) is not None:
        raise EngineError(reason)
    config = read_config(folder)
    tensors = dict(_read_tensors(config, files))
    if config.tie_word_embeddings:
        tensors.pop("output.weight", None)
    return _build(list_settings(config), tensors)


def _read_tensors(config: Any, files: list[Path]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the tensors of a checkpoint as its GGUF has them; matrices in float16 stay in it."""
    import torch
    from safetensors.torch import load_file

    from stages.common.gguf.model import compute_divisors, name_parts

    for file in files:
        for key, tensor in load_file(file).items():
            if key.endswith("rotary_emb.inv_freq"):
                continue  # old checkpoints have what is computed from the settings
            for name, change in name_parts(config, key):
                narrow = tensor.dtype == torch.float16 and tensor.dim() > 1
                numbers = change(tensor if narrow else tensor.float())
                yield name, numbers.contiguous().numpy()
    if (divisors := compute_divisors(config)) is not None:
        yield "rope_freqs.weight", divisors


def _build(values: Mapping[str, Any], tensors: dict[str, Any]) -> Weights:
    """Return the weights of a GGUF file's values and tensors."""
    architecture = values["general.architecture"]
    shape = _shape(values, architecture, len(tensors["token_embd.weight"]))
    if architecture in _INTERLEAVED:
        heads = {"attn_q": shape.heads, "attn_k": shape.kv_heads}
        for name, tensor in tensors.items():
            if (count := heads.get(name.split(".")[-2])) is not None:
                tensors[name] = _rows_side_by_side(tensor, count)
    return Weights(shape, tensors)


def _shape(values: Mapping[str, Any], architecture: str, vocabulary: int) -> DecoderShape:
    own = {key.removeprefix(f"{architecture}."): value for key, value in values.items()}
    layers, hidden, heads = own["block_count"], own["embedding_length"], own["attention.head_count"]
    head_dim = own.get("rope.dimension_count", hidden // heads)
    gemma = architecture == "gemma3"
    scaled_width = hidden // heads if gemma and layers == 62 else head_dim  # as the largest Gemma 3 has it
    return DecoderShape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=own.get("attention.head_count_kv", heads),
        head_dim=head_dim,
        vocabulary=vocabulary,
        context=own["context_length"],
        norm_epsilon=own["attention.layer_norm_rms_epsilon"],
        rotations=_list_rotations(architecture, layers, own),
        attention_scale=own.get("attention.scale", scaled_width**-0.5),
        embedding_scale=hidden**0.5 if gemma else own.get("embedding_scale", 1.0),
        residual_scale=own.get("residual_scale", 1.0),
        logit_divisor=own.get("logit_scale", 1.0),
        gelu=gemma,
    )


def _list_rotations(architecture: str, layers: int, own: Mapping[str, Any]) -> tuple[Rotation | None, ...]:
    """Return the rotation of each layer: the file's, but for layers whose architecture has its own."""
    usual = Rotation(own.get("rope.freq_base", 10_000.0), own.get("rope.scaling.factor", 1.0))
    if architecture == "smollm3":
        return tuple(None if layer % 4 == 3 else usual for layer in range(layers))
    if architecture == "gemma3":
        return tuple(usual if layer % 6 == 5 else Rotation(10_000.0) for layer in range(layers))
    return (usual,) * layers


def _rows_side_by_side(tensor: Any, heads: int) -> Any:
    if isinstance(tensor, Packed):
        numbers, scales = (_side_by_side(part, heads) for part in (tensor.numbers, tensor.scales))
        return Packed(numbers, scales, tensor.bits)
    return _side_by_side(tensor, heads)


def _side_by_side(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Undo llama.cpp's interleaving of the halves of the rotary embedding."""
    halves = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(halves).reshape(rows.shape)
