"""The pool of key-value blocks, and the prefix cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_CACHED = 32  # finished sequences to compare a prompt with, a few microseconds each


class BlockPool:
    """Blocks 0 to `count` - 1, reference-counted."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count))[::-1]
        self._references = [0] * count

    @property
    def free(self) -> int:
        """Number of free blocks."""
        return len(self._free)

    def take(self) -> int:
        """Allocate a block, with one reference."""
        block = self._free.pop()
        self._references[block] = 1
        return block

    def share(self, blocks: Sequence[int]) -> None:
        """Add a reference to blocks."""
        for block in blocks:
            self._references[block] += 1

    def give_back(self, blocks: Sequence[int]) -> None:
        """Remove a reference from blocks; those without any are free."""
        for block in blocks:
            self._references[block] -= 1
            if not self._references[block]:
                self._free.append(block)


@dataclass(frozen=True, slots=True)
class _CachedSequence:
    tokens: NDArray[np.int64]
    blocks: list[int]


class PrefixCache:
    """Finished sequences, whose blocks stay until they are needed.

    Prompts are compared token by token, because a system prompt is rarely a whole number of blocks long.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._cached: OrderedDict[int, _CachedSequence] = OrderedDict()  # least recently used first
        self._next = 0

    def keep(self, tokens: Sequence[int], blocks: list[int]) -> None:
        """Take over the references to blocks with the keys and values of `tokens`."""
        self._cached[self._next] = _CachedSequence(np.array(tokens, dtype=np.int64), blocks)
        self._next += 1
        if len(self._cached) > MAX_CACHED:
            self.drop_oldest()

    def drop_oldest(self) -> bool:
        """Evict the least recently used sequence; return False if there is none."""
        if not self._cached:
            return False
        _, cached = self._cached.popitem(last=False)
        self._pool.give_back(cached.blocks)
        return True

    def find(self, prompt: Sequence[int]) -> tuple[int, list[int]]:
        """Return the length of the longest cached prefix of a prompt, and its blocks."""
        wanted = np.array(prompt, dtype=np.int64)
        best, found = 0, None
        for key, cached in self._cached.items():
            if (length := _common_length(cached.tokens, wanted)) >= max(best, 1):
                best, found = length, key
        if found is None:
            return 0, []
        self._cached.move_to_end(found)
        return best, self._cached[found].blocks


def _common_length(first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    length = min(len(first), len(second))
    unlike = first[:length] != second[:length]
    return int(unlike.argmax()) if unlike.any() else length
