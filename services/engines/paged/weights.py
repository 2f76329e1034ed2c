"""The weights of a Llama as arrays, from a GGUF file or from a folder of safetensors."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.engines.paged.gguf_file import GgufFile, read_file
from services.engines.protocol import EngineError
from stages.common.errors import InputError


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """Sizes of a Llama; groups of `heads` share keys and values (`kv_heads`)."""

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
    """A Llama's sizes and its tensors by GGUF name, rows first: [outputs, inputs].

    The halves of the rotary embedding are contiguous, as in Hugging Face's checkpoints, not interleaved as in
    llama.cpp.
    """

    shape: LlamaShape
    tensors: dict[str, NDArray[Any]]


def read_weights(path: Path) -> Weights:
    """Read a Llama from a GGUF file, or from a folder with its `config.json` and safetensors.

    Raises:
        InputError: the file or folder is missing, or cannot be read.
        EngineError: it has another architecture.
    """
    return read_safetensors(path) if path.is_dir() else read_gguf(path)


def read_gguf(path: Path) -> Weights:
    """Read a Llama from a GGUF file.

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
    shape = _shape(file)
    tensors = dict(file.tensors)
    for name, array in tensors.items():
        if name.endswith("attn_q.weight"):
            tensors[name] = _side_by_side(array, shape.heads)
        elif name.endswith("attn_k.weight"):
            tensors[name] = _side_by_side(array, shape.kv_heads)
    return Weights(shape, tensors)


def read_safetensors(folder: Path) -> Weights:
    """Read a Llama from a checkpoint of transformers; bfloat16 weights become float32.

    Raises:
        InputError: the folder has no checkpoint.
        EngineError: it has another architecture.
    """
    import torch
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} contains no model", "fetch it again: dvc repro fetch_base")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if (reason := check_llama(config)) is not None:
        raise EngineError(reason)
    tensors = {}
    for file in files:
        for name, tensor in load_file(file).items():
            numbers = tensor if tensor.dtype == torch.float16 else tensor.float()
            tensors[_gguf_name(name)] = numbers.numpy()
    if config.get("tie_word_embeddings", False):
        tensors.pop("output.weight", None)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    rope = config.get("rope_parameters") or config
    shape = LlamaShape(
        layers=config["num_hidden_layers"],
        hidden=hidden,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        vocabulary=len(tensors["token_embd.weight"]),
        context=config["max_position_embeddings"],
        rope_base=rope.get("rope_theta") or 10_000.0,
        norm_epsilon=config["rms_norm_eps"],
    )
    return Weights(shape, tensors)


def check_llama(config: dict[str, Any]) -> str | None:
    """Return why the paged engine does not compute a model of this `config.json`; None if it does."""
    if config["model_type"] != "llama" or config.get("attention_bias") or config.get("mlp_bias"):
        return (
            f"the paged engine computes plain Llama models only, and this one is of {config['model_type']!r}"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default" or config.get("hidden_act", "silu") != "silu":
        return "the paged engine computes plain Llama models only, with no rope scaling and with SiLU"
    return None


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _gguf_name(name: str) -> str:
    """Return the GGUF name of a tensor of transformers' Llama; an unknown name stays."""
    stem = name.removesuffix(".weight")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    if layer is None:
        return f"{_GGUF_NAMES.get(stem, stem)}.weight"
    return f"blk.{layer[1]}.{_GGUF_NAMES.get(layer[2], layer[2])}.weight"


def _shape(file: GgufFile) -> LlamaShape:
    if (architecture := file.values.get("general.architecture")) != "llama":
        raise EngineError(f"the paged engine computes Llama models, and this one is of {architecture!r}")
    values = {key.removeprefix("llama."): value for key, value in file.values.items()}
    hidden, heads = values["embedding_length"], values["attention.head_count"]
    return LlamaShape(
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
    """Undo llama.cpp's interleaving of the halves of the rotary embedding."""
    halves = rows.reshape(heads, rows.shape[0] // heads // 2, 2, rows.shape[1]).swapaxes(1, 2)
    return np.ascontiguousarray(halves).reshape(rows.shape)
