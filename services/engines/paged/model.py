"""The compiled model, and its memory for keys and values."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.engines.paged.graph import build_graph
from services.engines.paged.weights import DecoderShape, read_weights
from services.engines.protocol import EngineError
from stages.common.errors import InputError

WARM_SIZES = (1, 8, 16, 32, 48, 64, 96)
MAX_PADDING = 12  # tokens of padding above which a step of another size is faster
# Values of ONEDNN_MAX_CPU_ISA under which oneDNN has no products in bfloat16, which the plugin still reports.
WITHOUT_BFLOAT16 = frozenset(
    {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
)


@dataclass(frozen=True, slots=True)
class StepInput:
    """The new tokens of one sequence in a step.

    Attributes:
        past: number of earlier tokens, whose keys and values are in the blocks.
        rows: number of new tokens, from the last, for which logits are returned.
    """

    token_ids: Sequence[int]
    past: int
    blocks: Sequence[int]
    rows: int


def computes_bfloat16(core: Any) -> bool:
    """Return whether OpenVINO computes in bfloat16 here: the processor can, and oneDNN may."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    return limit not in WITHOUT_BFLOAT16 and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class PagedModel:
    """A decoder on the CPU that computes tokens of many sequences in one step.

    Args:
        path: the GGUF file, or a folder with `config.json` and safetensors.
        cache_mib: memory for keys and values.
        threads: 0 lets OpenVINO choose.
        precision: `auto` computes in bfloat16 if the processor supports it, `float32` exactly.
    """

    def __init__(self, path: Path, *, cache_mib: int, threads: int = 0, precision: str = "auto") -> None:
        import openvino as ov

        weights = read_weights(path)
        self.shape: DecoderShape = weights.shape
        core = ov.Core()
        kind = "bf16" if precision == "auto" and computes_bfloat16(core) else "f32"
        self.dtype = {"bf16": "bfloat16", "f32": "float32"}[kind]
        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": kind,
            "KV_CACHE_PRECISION": kind,  # never the 8-bit default: rows of a block are copied
            "PERFORMANCE_HINT": "LATENCY",
        }
        if precision == "float32":
            options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0  # else activations meet packed weights in 8 bits
        if threads:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            self._compiled = core.compile_model(build_graph(weights), "CPU", options)
        except (RuntimeError, TypeError) as error:
            raise EngineError(f"OpenVINO {ov.__version__} cannot compile the paged graph: {error}") from error
        self._request = self._compiled.create_infer_request()
        self._size = 0  # tokens of the last step
        self._cache = self._allocate(cache_mib * 2**20)
        self.block_tokens: int = self._cache.shape[3]
        self.blocks = self._cache.shape[1] - 1  # the last takes the keys and values of padding

    def _allocate(self, size: int) -> NDArray[Any]:
        """Bind slices of one array [layers * 2, blocks, heads, block tokens, head_dim] to the graph."""
        import openvino as ov

        ports = [port for port in self._compiled.inputs if "_cache." in port.any_name]
        kind = ports[0].element_type
        dims = [dim.get_length() for dim in list(ports[0].partial_shape)[1:]]
        numbers = np.float32 if kind == ov.Type.f32 else np.uint16
        blocks = size // (len(ports) * math.prod(dims) * np.dtype(numbers).itemsize)
        if blocks < 1:
            raise InputError(
                f"a key-value cache of {size >> 20} MiB has no room for {dims[1]} tokens",
                "raise services.engine.kv_cache_mib in params.yaml",
            )
        # The operating system allocates the memory only when a block is first used.
        cache = np.zeros((len(ports), blocks + 1, *dims), numbers)
        for port, part in zip(ports, cache, strict=True):
            self._request.set_tensor(port, ov.Tensor(part, ov.Shape(part.shape), kind))
        return cache

    def warm_up(self, tokens: int) -> None:
        """Compute steps of a few sizes up to `tokens`, so that their kernels are compiled.

        The first step takes half a second. Kernels of other sizes are compiled on first use, which takes as
        long as the step itself.
        """
        for size in (*(n for n in WARM_SIZES if n < tokens), pad_count(tokens)):
            self.step([StepInput([0] * n, 0, [self.blocks], n) for n in _pieces(size, self.block_tokens)])

    def step(self, runs: Sequence[StepInput]) -> NDArray[np.float32]:
        """Compute the new tokens; return their logits [rows, vocabulary], input after input.

        The array is the graph's own memory and is valid until the next step.
        """
        count = sum(len(run.token_ids) for run in runs)
        # Changing the size of a step costs as much as a dozen tokens: the runtime prepares all nodes again.
        if not 0 <= self._size - count <= MAX_PADDING:
            self._size = pad_count(count)
        if padding := self._size - count:
            runs = [*runs, StepInput([0] * padding, 0, [self.blocks], 0)]
        lengths = [len(run.token_ids) for run in runs]
        begins = np.cumsum([0, *lengths])
        positions = [np.arange(run.past, run.past + n) for run, n in zip(runs, lengths, strict=True)]
        ends = begins[1:].tolist()
        wanted = [row for run, end in zip(runs, ends, strict=True) for row in range(end - run.rows, end)]
        self._set("input_ids", [token for run in runs for token in run.token_ids], np.int64)
        self._set("position_ids", np.concatenate(positions), np.int64)
        self._set("past_lens", [run.past for run in runs], np.int32)
        self._set("subsequence_begins", begins, np.int32)
        self._set("block_indices", [block for run in runs for block in run.blocks], np.int32)
        self._set("block_indices_begins", np.cumsum([0, *(len(run.blocks) for run in runs)]), np.int32)
        self._set(
            "max_context_len", max(run.past + n for run, n in zip(runs, lengths, strict=True)), np.int32
        )
        self._set("wanted", wanted + [0] * (pad_count(len(wanted)) - len(wanted)), np.int64)
        self._request.infer()
        logits: NDArray[np.float32] = self._request.get_output_tensor(0).data
        return logits.reshape(-1, self.shape.vocabulary)[: len(wanted)]

    @property
    def hidden(self) -> NDArray[np.float32]:
        """The last hidden states of the last step's rows [rows, hidden]; valid as long as its logits."""
        states: NDArray[np.float32] = self._request.get_output_tensor(1).data
        return states.reshape(-1, self.shape.hidden)

    def _set(self, name: str, values: Any, kind: type) -> None:
        import openvino as ov

        self._request.set_tensor(name, ov.Tensor(np.array(values, dtype=kind)))

    def copy_rows(self, source: int, target: int, rows: int) -> None:
        """Copy the keys and values of a block's first tokens to another block."""
        self._cache[:, target, :, :rows] = self._cache[:, source, :, :rows]


def pad_count(count: int) -> int:
    """Return the size of step, at least 1, that `count` tokens are padded to.

    Few sizes, because the runtime compiles kernels for each, which takes as long as a step.
    """
    if count <= 16:
        return max(count, 1)
    grain = 4 if count <= 64 else 8 if count <= 128 else 16
    return -(-count // grain) * grain


def _pieces(size: int, longest: int) -> list[int]:
    return [min(longest, size - begin) for begin in range(0, size, longest)]
