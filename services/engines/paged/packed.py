"""Matrices of a GGUF file that stay quantized in memory: 8 or 4 bits a number, and a scale for 32 of them.

Layout of the blocks: `block_q8_0` and `block_q4_0` in
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

GROUP = 32  # columns that share a scale
OFFSET = 8  # a number of 4 bits is stored without a sign, this much too large


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix [outputs, inputs] of small whole numbers, each times the scale of its group.

    Attributes:
        numbers: int8 [outputs, groups, 32]; of 4 bits uint8 [outputs, groups, 16], the even column in the
            lower half of a byte.
        scales: float16 [outputs, groups, 1].
    """

    numbers: NDArray[Any]
    scales: NDArray[np.float16]
    bits: Literal[4, 8]

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def columns(self) -> int:
        """Return the number of inputs."""
        return int(self.numbers.shape[1]) * GROUP

    def unpack(self) -> NDArray[np.float32]:
        """Return the matrix as float32."""
        numbers = self.numbers if self.bits == 8 else _split_bytes(self.numbers).astype(np.int8) - OFFSET
        values = numbers.astype(np.float32) * self.scales.astype(np.float32)
        return values.reshape(len(self), -1)


def pack_q8_0(raw: NDArray[np.uint8]) -> Packed:
    """Return rows of GGUF's Q8_0, [outputs, bytes], as they are computed with."""
    blocks = raw.reshape(len(raw), -1, 2 + GROUP)
    return Packed(blocks[..., 2:].copy().view(np.int8), blocks[..., :2].copy().view(np.float16), 8)


def pack_q4_0(raw: NDArray[np.uint8]) -> Packed:
    """Return rows of GGUF's Q4_0, whose bytes hold columns that are 16 apart, as they are computed with."""
    blocks = raw.reshape(len(raw), -1, 2 + GROUP // 2)
    halves = blocks[..., 2:]
    columns = np.concatenate([halves & 15, halves >> 4], axis=-1)
    return Packed(columns[..., ::2] | columns[..., 1::2] << 4, blocks[..., :2].copy().view(np.float16), 4)


def unpack(matrix: Any) -> Any:
    """Return a matrix as an array."""
    return matrix.unpack() if isinstance(matrix, Packed) else matrix


def concatenate(matrices: Sequence[Any]) -> Any:
    """Return matrices below each other; as an array if they are not all packed alike."""
    first = matrices[0]
    if isinstance(first, Packed) and all(isinstance(m, Packed) and m.bits == first.bits for m in matrices):
        numbers, scales = (
            np.concatenate([getattr(m, name) for m in matrices]) for name in ("numbers", "scales")
        )
        return Packed(numbers, scales, first.bits)
    return np.concatenate([unpack(m) for m in matrices])


def _split_bytes(numbers: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return two numbers for each byte, the lower half first: [..., bytes] to [..., 2 * bytes]."""
    return np.stack([numbers & 15, numbers >> 4], axis=-1).reshape(*numbers.shape[:-1], -1)
