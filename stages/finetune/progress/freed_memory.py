"""Giving back the memory of earlier batches before it makes the process larger than its estimate."""

from __future__ import annotations

from stages.common.machine.memory import read_held_memory, release_freed_memory
from stages.finetune.progress.memory import MemoryEstimate

# The pages that are given back are zeroed for the next batch again, which takes up to a tenth of its time.
BATCHES_BETWEEN = 8
# Of the estimate, by how much a batch may exceed it until then: with what a step adds, less than a tenth.
# Only where a batch is such a share of it: a smaller one cannot pass it by far, and only time is lost.
SURPLUS, LARGE = 0.04, 0.25
# Of what a batch takes, what does not fit into the places of others, though one of them was as large.
MISFIT = 0.5


class FreedMemory:
    """Gives back what earlier batches left before a batch that may not fit into its places.

    The allocator keeps freed blocks, because new pages cost more than a small operation does. Blocks of one
    batch do not fit into those of others: over hundreds of batches of many sizes a process held half as much
    again as one step takes.

    Args:
        estimate: of the largest batch; None: nothing is ever given back.
    """

    def __init__(self, estimate: MemoryEstimate | None) -> None:
        self._estimate = estimate
        self._largest = 0  # tokens of a batch since memory was given back
        self._batches = BATCHES_BETWEEN

    def make_room(self, tokens: int) -> None:
        """Give freed memory back where this batch may make the process larger than its estimate.

        Args:
            tokens: that are computed of the batch.
        """
        if self._estimate is None:
            return
        needed = self._estimate.activations * tokens / self._estimate.tokens
        needed *= 1 if tokens > self._largest else MISFIT
        held, peak = read_held_memory(), self._estimate.peak
        is_large = self._estimate.activations > LARGE * peak
        is_due = self._batches >= BATCHES_BETWEEN or (is_large and held + needed > peak * (1 + SURPLUS))
        if held > peak or (is_due and held + needed > peak):
            release_freed_memory()
            self._largest = self._batches = 0
        self._largest = max(self._largest, tokens)
        self._batches += 1
