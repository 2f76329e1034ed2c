"""Who holds which block of keys and values, and what of them a new prompt can begin with."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

KEPT = 32  # ended sequences to compare a prompt with: a few microseconds each


class BlockPool:
    """Blocks 0 to `count` - 1; one that several sequences hold is free when the last lets it go."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count))[::-1]
        self._holders = [0] * count

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """Return a free block, held once."""
        block = self._free.pop()
        self._holders[block] = 1
        return block

    def share(self, blocks: Sequence[int]) -> None:
        """Hold blocks once more."""
        for block in blocks:
            self._holders[block] += 1

    def give_back(self, blocks: Sequence[int]) -> None:
        """Let blocks go."""
        for block in blocks:
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free.append(block)


@dataclass(frozen=True, slots=True)
class _Kept:
    tokens: NDArray[np.int64]
    blocks: list[int]


class PrefixCache:
    """Sequences that have ended, whose blocks stay until others need them.

    A new prompt is compared token by token: a system prompt is seldom a whole number of blocks long.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._kept: OrderedDict[int, _Kept] = OrderedDict()  # the one used last stands last
        self._next = 0

    def keep(self, tokens: Sequence[int], blocks: list[int]) -> None:
        """Take over a sequence's hold of its blocks, which have the keys and values of `tokens`."""
        self._kept[self._next] = _Kept(np.array(tokens, dtype=np.int64), blocks)
        self._next += 1
        if len(self._kept) > KEPT:
            self.drop_oldest()

    def drop_oldest(self) -> bool:
        """Let go the sequence that was of no use for longest; return False if there is none."""
        if not self._kept:
            return False
        _, kept = self._kept.popitem(last=False)
        self._pool.give_back(kept.blocks)
        return True

    def find(self, prompt: Sequence[int]) -> tuple[int, list[int]]:
        """Return how many tokens of a prompt are known, and the blocks that hold them."""
        wanted = np.array(prompt, dtype=np.int64)
        best, found = 0, None
        for key, kept in self._kept.items():
            if (length := _common(kept.tokens, wanted)) >= max(best, 1):
                best, found = length, key
        if found is None:
            return 0, []
        self._kept.move_to_end(found)
        return best, self._kept[found].blocks


def _common(first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    length = min(len(first), len(second))
    unlike = first[:length] != second[:length]
    return int(unlike.argmax()) if unlike.any() else length
