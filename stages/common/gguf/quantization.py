"""Numbers of 4 bits in GGUF's layouts, where the package gguf has none or one that loses more.

Layouts: `block_q4_0` and `block_q4_K` in https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

# Variants of `compress.variants` → the quantization of their GGUF; None: that of the export.
VARIANTS = {
    "int8": "q8_0",
    "int4": "q4_0",
    "q4_k": "q4_k",
    "fewer_layers": None,
    "pruned": None,
    "small_vocabulary": None,
}
HEALED = ("fewer_layers", "pruned")  # trained on after parts were left out

GROUP = 32  # numbers that share a scale
LOWEST, HIGHEST = -8, 7  # of 4 bits with a sign
PARTS, SUPER = 8, 256  # groups of a block of Q4_K, and its numbers
ROWS_AT_ONCE = 1 << 15  # groups that are searched together: some tens of MiB


def quantize_values(values: Floats, kind: GGMLQuantizationType) -> Any:
    """Return a tensor in a type of GGUF, [..., bytes] where the type has blocks."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    own: dict[GGMLQuantizationType, tuple[int, Callable[[Floats], Bytes]]] = {
        GGMLQuantizationType.Q4_0: (GROUP, _pack_q4_0),
        GGMLQuantizationType.Q4_K: (SUPER, _pack_q4_k),
    }
    if kind not in own:
        return quantize(values, kind)
    size, pack = own[kind]
    blocks = np.ascontiguousarray(values, np.float32).reshape(-1, size)
    packed = np.concatenate([pack(part) for part in _cut(blocks, ROWS_AT_ONCE * GROUP // size)])
    return packed.reshape(*values.shape[:-1], -1)


def find_scales(groups: Floats) -> Floats:
    """Return the scale of each group, [groups, 1], that rounds its numbers to 4 bits with the least error.

    The number of the largest size becomes each whole number in turn; llama.cpp always makes it -8. A scale is
    rounded to float16, as it is stored. Numbers that have been rounded with a scale get that scale again.
    """
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=-1, keepdims=True), axis=-1)
    best = np.zeros_like(largest)
    least = np.full_like(largest, np.inf)
    for whole in (*range(LOWEST, 0), *range(1, HIGHEST + 1)):
        scales = (largest / whole).astype(np.float16).astype(np.float32)
        error = np.square(round_to_scales(groups, scales) * scales - groups).sum(axis=-1, keepdims=True)
        better = error < least
        best, least = np.where(better, scales, best), np.where(better, error, least)
    return best


def round_to_scales(groups: Floats, scales: Floats) -> Floats:
    """Return the whole numbers of 4 bits that times the scales are nearest."""
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)
    return np.clip(np.rint(groups * inverse), LOWEST, HIGHEST)


def _pack_q4_0(groups: Floats) -> Bytes:
    """Return blocks of 18 bytes: the scale, then 16 bytes of two numbers that are 16 apart."""
    scales = find_scales(groups)
    numbers = (round_to_scales(groups, scales) - LOWEST).astype(np.uint8)
    halves = numbers[:, : GROUP // 2] | numbers[:, GROUP // 2 :] << 4
    return np.concatenate([scales.astype(np.float16).view(np.uint8), halves], axis=-1)


def _pack_q4_k(blocks: Floats) -> Bytes:
    """Return blocks of 144 bytes: number * scale - offset, both of 6 bits a group, with their two units."""
    groups = blocks.reshape(-1, PARTS, GROUP)
    scales, offsets = _fit_lines(groups)
    unit, whole_scales = _round_to_six_bits(scales)
    offset_unit, whole_offsets = _round_to_six_bits(offsets)
    used, used_offsets = unit * whole_scales, offset_unit * whole_offsets
    inverse = np.divide(1.0, used, out=np.zeros_like(used), where=used > 0)[..., None]
    numbers = np.clip(np.rint((groups + used_offsets[..., None]) * inverse), 0, 15).astype(np.uint8)
    halves = (numbers[:, ::2] | numbers[:, 1::2] << 4).reshape(len(blocks), -1)
    units = np.concatenate([unit, offset_unit], axis=-1).astype(np.float16).view(np.uint8)
    return np.concatenate([units, _pack_six_bits(whole_scales, whole_offsets), halves], axis=-1)


def _fit_lines(groups: Floats) -> tuple[Floats, Floats]:
    """Return scale and offset, [..., groups], of the least error found for numbers from 0 to 15.

    As llama.cpp's `make_qkx2_quants`: for ranges around that of the numbers, the line through what they round
    to is fitted by least squares. The offset is not negative.
    """
    low = np.minimum(groups.min(axis=-1, keepdims=True), 0)
    span = np.maximum(groups.max(axis=-1, keepdims=True) - low, np.float32(1e-20))
    best_scale, best_low = span / 15, low
    least = np.full_like(low, np.inf)
    mean = groups.mean(axis=-1, keepdims=True)
    for step in range(-10, 11):
        numbers = np.clip(np.rint((groups - low) * ((15 + 0.1 * step) / span)), 0, 15)
        centre = numbers.mean(axis=-1, keepdims=True)
        spread = np.square(numbers - centre).sum(axis=-1, keepdims=True)
        product = ((numbers - centre) * (groups - mean)).sum(axis=-1, keepdims=True)
        scale = np.divide(product, spread, out=span / 15, where=spread > 0)
        start = mean - scale * centre
        through_zero = (numbers * groups).sum(axis=-1, keepdims=True)
        squares = np.maximum(np.square(numbers).sum(axis=-1, keepdims=True), np.float32(1e-20))
        scale = np.where(start > 0, through_zero / squares, scale)
        start = np.minimum(start, 0)
        error = np.square(numbers * scale + start - groups).sum(axis=-1, keepdims=True)
        better = (error < least) & (scale > 0)
        best_scale = np.where(better, scale, best_scale)
        best_low, least = np.where(better, start, best_low), np.where(better, error, least)
    return best_scale[..., 0], -best_low[..., 0]


def _round_to_six_bits(values: Floats) -> tuple[Floats, NDArray[np.uint8]]:
    """Return the unit of each block, [blocks, 1], as float16 rounds it, and whole numbers of it up to 63."""
    unit = (values.max(axis=-1, keepdims=True) / 63).astype(np.float16).astype(np.float32)
    inverse = np.divide(1.0, unit, out=np.zeros_like(unit), where=unit > 0)
    return unit, np.clip(np.rint(values * inverse), 0, 63).astype(np.uint8)


def _pack_six_bits(scales: NDArray[np.uint8], offsets: NDArray[np.uint8]) -> Bytes:
    """Return 8 scales and 8 offsets in 12 bytes: those of the last four groups are cut in two."""
    (first, last), (first_offset, last_offset) = (np.split(part, 2, axis=-1) for part in (scales, offsets))
    low = (last & 15) | (last_offset & 15) << 4
    return np.concatenate([first | last >> 4 << 6, first_offset | last_offset >> 4 << 6, low], axis=-1)


def _cut(blocks: Floats, size: int) -> Iterator[Floats]:
    for start in range(0, len(blocks), size):
        yield blocks[start : start + size]
