"""Write a transformers model as one GGUF file, the format of llama.cpp, Ollama and OpenVINO.

A GGUF file has a few settings and the tensors under GGUF's names; the arithmetic is in the program that reads
it (`architectures.py`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.common.errors import InputError
from stages.common.gguf.architectures import Change, Part, find_architecture, get_head_size, read_rotation
from stages.common.gguf.quantization import quantize_values
from stages.common.gguf.vocabulary import FIX, Vocabulary, add_vocabulary
from stages.common.model.loading import count_context_tokens, make_empty

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

# Error of a tensor: the norm of the rounding error over the norm of the tensor. The limits are about four
# times the error of a normal distribution in these types, so that only a broken tensor exceeds them.
LARGEST_ERROR = {"F32": 0.0, "F16": 1e-3, "BF16": 8e-3, "Q8_0": 0.03, "Q4_0": 0.35, "Q4_K": 0.3}

# Words of `export.quantization` and `compress.variants` → types of GGUF.
TYPES = {"f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0", "q4_k": "Q4_K"}

ROTATION_DIVISORS = "rope_freqs.weight"

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


def list_tensors(model: Any) -> Iterator[Tensor]:
    """Yield the tensors of a model under their names in GGUF; of one with pictures, those of its text.

    Raises:
        InputError: GGUF has no name for one of them.
    """
    import torch

    config = model.config.get_text_config()
    for key, tensor in _list_state(model):
        for name, change in name_parts(config, key):
            shape = change(torch.empty_like(tensor, device="meta")).shape
            yield Tensor(name, tuple(shape), partial(_values, tensor, change))
    if (divisors := compute_divisors(config)) is not None:
        yield Tensor(ROTATION_DIVISORS, divisors.shape, lambda: divisors)


def name_parts(config: Any, key: str) -> list[Part]:
    """Return the names in GGUF of the parts of a tensor, and how each is laid out there.

    Raises:
        InputError: GGUF has no name for one of them.
    """
    architecture = find_architecture(config)
    names = _map_names(architecture.name, config.num_hidden_layers)
    parts = []
    for part, change in architecture.split(config, key):
        name = names.get_name(part, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise InputError(f"the base model's tensor {part} has no name in GGUF's {architecture.name}", FIX)
        parts.append((name, change))
    return parts


@cache
def _map_names(architecture: str, layers: int) -> Any:
    import gguf

    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(numbers[architecture], layers)


def _list_state(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the tensors that compute text, without an output layer that is the embedding."""
    state = model.state_dict()
    if model.config.get_text_config() is not model.config:
        state = {f"model.{key}": tensor for key, tensor in model.get_decoder().state_dict().items()}
        state["lm_head.weight"] = model.get_output_embeddings().weight
    embedding = model.get_input_embeddings().weight
    for key, tensor in state.items():
        # Tied: without an output layer GGUF uses the embedding.
        if not (key == "lm_head.weight" and tensor.data_ptr() == embedding.data_ptr()):
            yield key, tensor


def _values(tensor: Any, change: Change) -> Array:
    import torch

    return change(tensor.detach().to("cpu", torch.float32)).contiguous().numpy()


def compute_divisors(config: Any) -> Array | None:
    """Return the divisor of each rotary frequency, shape (head size / 2); None if all are 1."""
    import numpy as np

    rope = read_rotation(config)
    if (kind := rope.get("rope_type", "default")) != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    size = get_head_size(config)
    used, _ = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    plain = rope["rope_theta"] ** -(np.arange(0, size, 2) / size)
    return (plain / used.double().numpy()).astype(np.float32)


def choose_type(tensor: Tensor, quantization: str) -> GGMLQuantizationType:
    """Return the type to write a tensor in.

    Norms, biases, learned positions and what chooses experts stay float32: they are small, and llama.cpp
    requires it. With q4_0, embedding and output layer have 8 bits: with four, far more answers would change
    than the size is worth. Tensors whose rows are not a multiple of a block stay float16.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(tensor.shape) == 1 or tensor.name.endswith(("position_embd.weight", "ffn_gate_inp.weight")):
        return GGMLQuantizationType.F32
    outer = tensor.name in ("token_embd.weight", "output.weight")
    eight_bits = outer and quantization in ("q4_0", "q4_k")
    wanted = GGMLQuantizationType["Q8_0" if eight_bits else TYPES[quantization]]
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
        quantization: `f16`, `bf16`, `q8_0`, `q4_0` or `q4_k`.
        name: the name of the model in the file.
        on_progress: called with the number of tensors written, and the number of all.
    """
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGUFWriter

    tensors = list(list_tensors(model))
    writer = GGUFWriter(path, find_architecture(model.config).name)
    try:
        _add_settings(writer, model.config.get_text_config(), vocabulary, quantization, name)
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
                np.ascontiguousarray(quantize_values(tensor.values(), choose_type(tensor, quantization)))
            )
            on_progress(done, len(tensors))
    finally:
        writer.close()


def count_block(quantization: str) -> int:
    """Return how many weights of a row a quantization takes together."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    return int(GGML_QUANT_SIZES[GGMLQuantizationType[TYPES[quantization]]][0])


def find_uneven_tensor(config: Any, quantization: str) -> str | None:
    """Return the first matrix whose rows cannot be cut into the blocks of a quantization; None if all can.

    Args:
        config: of the model; its tensors are listed without their values.
    """
    from gguf import GGMLQuantizationType

    plain = {"f16", "bf16"}
    for tensor in list_tensors(make_empty(config)):
        if quantization not in plain and choose_type(tensor, quantization) == GGMLQuantizationType.F16:
            return f"{tensor.name} with {tensor.shape[-1]} columns"
    return None


def list_settings(config: Any) -> dict[str, Any]:
    """Return the settings of a model's GGUF file that decide its arithmetic, by their keys there."""
    from gguf import GGUFWriter

    writer = GGUFWriter(None, find_architecture(config).name)
    _add_sizes(writer, config)
    return {key: entry.value for key, entry in writer.kv_data[0].items()}


def _add_settings(
    writer: GGUFWriter, config: Any, vocabulary: Vocabulary, quantization: str, name: str
) -> None:
    import gguf

    kinds = {name: f"MOSTLY_{kind}" for name, kind in TYPES.items()} | {"q4_k": "MOSTLY_Q4_K_S"}
    # llama.cpp strips blanks after the control tokens of any model with this in its name.
    writer.add_name(re.sub(r"(?i)phi-?3", "Phi 3", name))
    writer.add_file_type(gguf.LlamaFileType[kinds[quantization]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(len(vocabulary.tokens))
    _add_sizes(writer, config)


def _add_sizes(writer: GGUFWriter, config: Any) -> None:
    if context := count_context_tokens(config):
        writer.add_context_length(context)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(_read_feed_forward(config))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", config.num_attention_heads))
    writer.add_key_length(get_head_size(config))
    writer.add_value_length(get_head_size(config))
    if rope := read_rotation(config):
        writer.add_rope_dimension_count(get_head_size(config))
        writer.add_rope_freq_base(rope["rope_theta"])
    if (epsilon := getattr(config, "rms_norm_eps", None)) is not None:
        writer.add_layer_norm_rms_eps(epsilon)
    else:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    find_architecture(config).add_settings(writer, config)


def _read_feed_forward(config: Any) -> int:
    """Return the width of the feed-forward layers; GPT-2's is four times the model's if it has none."""
    width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return int(width or 4 * config.hidden_size)


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
