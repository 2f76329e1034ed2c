"""Giving back the memory of earlier batches before it makes the process larger than its estimate."""

from __future__ import annotations

from stages.common.machine.memory import read_held_memory, release_freed_memory
from stages.finetune.progress.memory import MemoryEstimate


class FreedMemory:
    """Gives back what earlier batches left before a batch that may not fit into its places.

    The allocator keeps freed blocks, because new pages cost more than a small operation does. Blocks of a
    larger batch do not fit into those of smaller ones: over hundreds of batches of many sizes a process held
    half as much again as one step takes.

    Args:
        estimate: of the largest batch; None: nothing is ever given back.
    """

    def __init__(self, estimate: MemoryEstimate | None) -> None:
        self._estimate = estimate
        self._largest = 0  # tokens of a batch since memory was given back

    def make_room(self, tokens: int) -> None:
        """Give freed memory back where this batch may make the process larger than its estimate.

        Args:
            tokens: that are computed of the batch.
        """
        if self._estimate is None:
            return
        needed = self._estimate.activations * tokens // self._estimate.tokens if tokens > self._largest else 0
        if read_held_memory() + needed > self._estimate.peak:
            release_freed_memory()
            self._largest = 0
        self._largest = max(self._largest, tokens)
