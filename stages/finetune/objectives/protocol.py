"""What the trainer asks of an objective: the sequences of each row, and the loss of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from stages.common.chat.template import Encoded
from stages.finetune.shared_prefix import Layout

Arrange = Callable[[Sequence[Encoded]], Layout]  # as the trainer lays out the sequences of a batch


@dataclass(frozen=True, slots=True)
class Start:
    """What an objective gets before the first update.

    Attributes:
        plan: the batches of the whole training, as numbers of rows.
        folder: of the checkpoints, where something can be kept for a process that resumes.
        attention: by which the model attends without the training's own.
    """

    plan: Sequence[Sequence[int]]
    arrange: Arrange
    folder: Path
    attention: str


@dataclass(frozen=True, slots=True)
class Pass:
    """Sequences that go through a model.

    Attributes:
        sequences: how many; `width` tokens of each are computed, with padding.
        answers: tokens at which the output layer is computed.
        tokens: of the sequences that are learned, without padding.
        reader: the model, where it only reads; None for the one that is trained, with gradients.
    """

    sequences: int
    width: int
    answers: int
    tokens: int = 0
    reader: Any = None


def ignore(one: Pass) -> None:
    """Do nothing with a pass."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of a batch (of several processes: of this one's share), laid out.

    Attributes:
        rows: their numbers; none where this process only computes along with the others.
        layout: the sequences through which gradients go.
        learned: how many tokens are learned of each of them.
        units: one element for each thing over which the loss is averaged, such as tokens or pairs.
        others: further sequences, without gradients.
        place: the update that the batch is for, and its number in that update.
        record: called with each pass that the loss takes, one with gradients before it is computed.
    """

    rows: Sequence[int]
    layout: Layout
    learned: tuple[int, ...]
    units: Tensor
    others: Layout | None = None
    place: tuple[int, int] = (0, 0)
    record: Callable[[Pass], None] = ignore

    def record_layout(self, layout: Layout, tokens: int = 0, reader: Any = None) -> None:
        """Record the pass of a layout; arguments as the attributes of `Pass`."""
        sequences, width = layout.input_ids.shape
        self.record(Pass(sequences, width, len(layout.targets), tokens, reader))

    def to(self, device: torch.device) -> Batch:
        """Return the same batch on a device."""
        others = self.others.to(device) if self.others else None
        return replace(self, layout=self.layout.to(device), units=self.units.to(device), others=others)


class Objective(Protocol):
    """What is optimized over rows, which are numbered from 0.

    Attributes:
        sequences: of all rows, those of each row together; `sequences_of_row` of each.
        lengths: tokens of each row, over its sequences; learned_counts: those that are learned of them.
    """

    sequences: Sequence[Encoded]
    sequences_of_row: int
    lengths: Sequence[int]
    learned_counts: Sequence[int]

    def list_sequences(self, rows: Sequence[int]) -> list[Encoded]:
        """Return the sequences of rows through which gradients go."""
        ...

    def prepare(self, model: Any, start: Start) -> None:
        """Compute what is needed of the model as it is before the first update."""
        ...

    def collate(self, rows: Sequence[int], arrange: Arrange) -> Batch:
        """Lay out rows as a batch."""
        ...

    def compute_loss(self, model: Any, batch: Batch) -> Tensor:
        """Return the sum of the losses of a batch over its units, and record each pass."""
        ...

    def take_figures(self) -> dict[str, float]:
        """Return what was seen in the update that is done, by name; it is logged beside the loss."""
        ...

    def measure(self, model: Any, arrange: Arrange) -> dict[str, Any] | None:
        """Return how the model does on rows that were held out for this objective; None without any."""
        ...


def make_idle(batch: Batch) -> Batch:
    """Return a batch of which nothing is learned: several processes must all compute, also without a row."""
    return replace(
        batch,
        rows=[],
        layout=batch.layout.without_targets(),
        learned=(),
        units=batch.units[:0],
        others=None,
    )
