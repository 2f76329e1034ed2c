"""Write a transformers model as one GGUF file, the format of llama.cpp, Ollama and OpenVINO.

A GGUF file has a few settings and the tensors under GGUF's names; the arithmetic is in the program that reads
it. So only architectures are supported whose arithmetic there is known to be the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.common.errors import InputError
from stages.common.gguf.vocabulary import FIX, Vocabulary, add_vocabulary
from stages.common.model.loading import count_context_tokens

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

# model_type of transformers → architecture of GGUF.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

# Error of a tensor: the norm of the rounding error over the norm of the tensor. The limits are about four
# times the error of a normal distribution in these types, so that only a broken tensor exceeds them.
LARGEST_ERROR = {"F32": 0.0, "F16": 1e-3, "BF16": 8e-3, "Q8_0": 0.03, "Q4_0": 0.35}

Array = Any  # numpy.ndarray, which is imported only where it is needed


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor with its name in GGUF; `values` computes it as float32."""

    name: str
    shape: tuple[int, ...]
    values: Callable[[], Array]


@dataclass(frozen=True, slots=True)
class TensorReport:
    """The tensors of a GGUF file, compared with the model.

    Attributes:
        types: number of tensors by type.
        errors: the largest error of the tensors of each type; see `LARGEST_ERROR`.
    """

    types: dict[str, int]
    errors: dict[str, float]


def find_architecture(config: Any) -> str:
    """Return the GGUF architecture for a model of this configuration.

    Raises:
        InputError: no architecture is known to compute the same.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"the base model's architecture {kind!r} has no GGUF export (known: {known})", FIX)
    if config.hidden_act not in ("silu", "swish"):
        raise InputError(f"the base model's activation {config.hidden_act!r} is not GGUF's silu", FIX)
    rope = config.rope_parameters
    scaled = ("default", "llama3") if ARCHITECTURES[kind] == "llama" else ("default",)
    if rope.get("rope_type", "default") not in scaled:
        raise InputError(
            f"the base model scales its positions by {rope['rope_type']!r}, which the GGUF export of {kind} "
            f"does not know (it knows {', '.join(scaled)})",
            FIX,
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError("the base model rotates only a part of each head", FIX)
    return ARCHITECTURES[kind]


def list_tensors(model: Any) -> Iterator[Tensor]:
    """Yield the tensors of a model under their names in GGUF.

    Raises:
        InputError: GGUF has no name for one of them.
    """
    import gguf

    config = model.config
    architecture = find_architecture(config)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[architecture], config.num_hidden_layers)
    state = model.state_dict()
    embedding = model.get_input_embeddings().weight.data_ptr()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, tensor in state.items():
        if key == "lm_head.weight" and tensor.data_ptr() == embedding:
            continue  # tied: without an output layer GGUF uses the embedding
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise InputError(f"the base model's tensor {key} has no name in GGUF's {architecture}", FIX)
        # GGUF's llama rotates adjacent values, transformers the two halves of a head; qwen keeps halves.
        halves = next((heads[h] for h in heads if f".{h}." in key), None) if architecture == "llama" else None
        yield Tensor(name, tuple(tensor.shape), partial(_values, tensor, halves))
    if config.rope_parameters.get("rope_type", "default") == "llama3":
        yield Tensor("rope_freqs.weight", (_head_size(config) // 2,), partial(_position_divisors, model))


def _values(tensor: Any, halves_of_heads: int | None) -> Array:
    import torch

    values = tensor.detach().to("cpu", torch.float32).numpy()
    if halves_of_heads is None:
        return values
    size = len(values) // halves_of_heads
    pairs = values.reshape(halves_of_heads, 2, size // 2, *values.shape[1:]).swapaxes(1, 2)
    return pairs.reshape(values.shape)


def _position_divisors(model: Any) -> Array:
    """Return the divisor of each rotary frequency; shape (head size / 2)."""
    import numpy as np

    config, size = model.config, _head_size(model.config)
    plain = config.rope_parameters["rope_theta"] ** -(np.arange(0, size, 2) / size)
    used = model.get_decoder().rotary_emb.inv_freq.detach().cpu().double().numpy()
    return (plain / used).astype(np.float32)


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def choose_type(tensor: Tensor, quantization: str) -> GGMLQuantizationType:
    """Return the type to write a tensor in.

    Norms and biases stay float32: they are small, and llama.cpp requires it. With q4_0, embedding and output
    layer have 8 bits: with four, far more answers would change than the size is worth. Tensors whose rows are
    not a multiple of a block stay float16.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(tensor.shape) == 1:
        return GGMLQuantizationType.F32
    outer = tensor.name in ("token_embd.weight", "output.weight")
    wanted = GGMLQuantizationType["Q8_0" if outer and quantization == "q4_0" else quantization.upper()]
    block, _ = GGML_QUANT_SIZES[wanted]
    return wanted if tensor.shape[-1] % block == 0 else GGMLQuantizationType.F16


def write_gguf(
    path: Path,
    model: Any,
    vocabulary: Vocabulary,
    quantization: str,
    name: str,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the model with its vocabulary, with one tensor at a time in memory in addition to the model.

    Args:
        quantization: `f16`, `bf16`, `q8_0` or `q4_0`.
        name: the name of the model in the file.
        on_progress: called with the number of tensors written, and the number of all.
    """
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGUFWriter
    from gguf.quants import quantize

    tensors = list(list_tensors(model))
    writer = GGUFWriter(path, find_architecture(model.config))
    try:
        _add_settings(writer, model.config, vocabulary, quantization, name)
        add_vocabulary(writer, vocabulary)
        for tensor in tensors:
            kind = choose_type(tensor, quantization)
            block, block_bytes = GGML_QUANT_SIZES[kind]
            size = math.prod(tensor.shape) // block * block_bytes
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, tensor in enumerate(tensors, 1):
            writer.write_tensor_data(
                np.ascontiguousarray(quantize(tensor.values(), choose_type(tensor, quantization)))
            )
            on_progress(done, len(tensors))
    finally:
        writer.close()


def _add_settings(
    writer: GGUFWriter, config: Any, vocabulary: Vocabulary, quantization: str, name: str
) -> None:
    import gguf

    kinds = {"f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[kinds[quantization]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(len(vocabulary.tokens))
    if context := count_context_tokens(config):
        writer.add_context_length(context)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_size(config))
    writer.add_value_length(_head_size(config))
    writer.add_rope_dimension_count(_head_size(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def check_tensors(reader: GGUFReader, model: Any, file: Path) -> TensorReport:
    """Compare every tensor of a GGUF file with the model's, and return the largest errors.

    Raises:
        InputError: one is missing, has another shape, or differs by more than the rounding of its type.
    """
    written = {tensor.name: tensor for tensor in reader.tensors}
    types: Counter[str] = Counter()
    errors: dict[str, float] = {}
    for tensor in list_tensors(model):
        found = written.pop(tensor.name, None)
        if found is None:
            raise InputError(f"{file} lacks the tensor {tensor.name}", "run again: dvc repro export")
        kind = found.tensor_type.name
        error = _error(tensor.values(), found.data, found.tensor_type)
        if not error <= LARGEST_ERROR[kind]:  # also if it is not a number
            raise InputError(
                f"{file}: {tensor.name} as {kind} has an error of {error:.2g}, more than the "
                f"{LARGEST_ERROR[kind]:g} that rounding can explain",
                "set export.quantization: bf16, which has the range of the model's own numbers",
            )
        types[kind] += 1
        errors[kind] = max(errors.get(kind, 0.0), error)
    if written:
        raise InputError(
            f"{file} has tensors unknown to the model: {sorted(written)}",
            "run again: dvc repro export",
        )
    return TensorReport(dict(sorted(types.items())), dict(sorted(errors.items())))


def _error(values: Array, data: np.ndarray[Any, Any], kind: GGMLQuantizationType) -> float:
    """Return the norm of the difference over the norm of the values; infinite if the shapes differ."""
    import numpy as np
    from gguf.quants import dequantize

    read = dequantize(data, kind)
    if read.shape != values.shape:
        return math.inf
    norm = float(np.linalg.norm(values))
    difference = float(np.linalg.norm(read - values))
    return difference / norm if norm else difference
