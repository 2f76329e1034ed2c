"""Read a GGUF file without its vocabulary.

The package gguf reads every token and merge into an array, which takes seconds; they are skipped here, since
the tokenizer has its own files. Format: version 3 of
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from services.engines.paged.packed import pack_q4_0, pack_q8_0

MAGIC = b"GGUF"
VERSION = 3
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class GgufFile:
    """Contents of a file: scalar and string values by key, and tensors by name, rows first.

    A tensor is an array, or a `Packed` matrix.
    """

    values: dict[str, Any]
    tensors: dict[str, Any]


def read_file(path: Path) -> GgufFile:
    """Read a GGUF file; matrices in Q8_0 and Q4_0 stay packed, other quantized tensors become F32.

    Raises:
        ValueError: it is not GGUF version 3, or is truncated.
        OSError: it cannot be opened.
    """
    with path.open("rb") as file:
        if path.stat().st_size < 24:
            raise ValueError("it is too short for a header")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return _read(_Cursor(data))
    except struct.error as error:
        raise ValueError(f"it is truncated ({error})") from None


@dataclass(slots=True)
class _Cursor:
    data: mmap.mmap
    at: int = field(default=0)

    def take(self, kind: str) -> Any:
        """Read a number."""
        (value,) = struct.unpack_from(f"<{kind}", self.data, self.at)
        self.at += struct.calcsize(f"<{kind}")
        return value

    def text(self) -> str:
        """Read a string."""
        size = self.take("Q")
        begin, self.at = self.at, self.at + size
        return self.data[begin : self.at].decode("utf-8", "replace")

    def skip_array(self) -> None:
        """Skip an array."""
        kind, count = self.take("I"), self.take("Q")
        if kind == ARRAY:
            for _ in range(count):
                self.skip_array()
        elif kind == STRING:
            for _ in range(count):
                self.at += 8 + struct.unpack_from("<Q", self.data, self.at)[0]
        else:
            self.at += count * struct.calcsize(f"<{SCALARS[kind]}")


def _read(cursor: _Cursor) -> GgufFile:
    if cursor.data[:4] != MAGIC:
        raise ValueError("it does not start with GGUF")
    cursor.at = 4
    if (version := cursor.take("I")) != VERSION:
        raise ValueError(f"it is GGUF version {version}; only {VERSION} is supported")
    tensor_count, value_count = cursor.take("Q"), cursor.take("Q")
    values = dict(_values(cursor, value_count))
    infos = [(cursor.text(), *_info(cursor)) for _ in range(tensor_count)]
    alignment = values.get("general.alignment", DEFAULT_ALIGNMENT)
    begin = -(-cursor.at // alignment) * alignment
    tensors = {name: _tensor(cursor.data, begin + offset, dims, kind) for name, dims, kind, offset in infos}
    return GgufFile(values, tensors)


def _values(cursor: _Cursor, count: int) -> Iterator[tuple[str, Any]]:
    for _ in range(count):
        key, kind = cursor.text(), cursor.take("I")
        if kind == ARRAY:
            cursor.skip_array()
        elif kind == STRING:
            yield key, cursor.text()
        elif kind in SCALARS:
            yield key, cursor.take(SCALARS[kind])
        else:
            raise ValueError(f"{key} has the unknown type {kind}")


def _info(cursor: _Cursor) -> tuple[list[int], int, int]:
    dims = [cursor.take("Q") for _ in range(cursor.take("I"))]
    return dims[::-1], cursor.take("I"), cursor.take("Q")  # the file stores the fastest axis first


def _tensor(data: mmap.mmap, begin: int, dims: list[int], kind: int) -> Any:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    quantization = GGMLQuantizationType(kind)
    block, size = GGML_QUANT_SIZES[quantization]
    shape = (*dims[:-1], dims[-1] // block * size)
    raw = np.frombuffer(data, np.uint8, int(np.prod(shape)), begin).reshape(shape)
    plain = {GGMLQuantizationType.F16: np.float16, GGMLQuantizationType.F32: np.float32}
    if quantization in plain:
        return raw.view(plain[quantization]).copy()  # the runtime needs writable memory
    packed = {GGMLQuantizationType.Q8_0: pack_q8_0, GGMLQuantizationType.Q4_0: pack_q4_0}
    if quantization in packed and len(dims) == 2:
        return packed[quantization](raw)
    return dequantize(raw, quantization)
