"""Learn the answers: the cross entropy of their tokens (methods lora, rslora, dora, full and partial)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from stages.common.chat.template import Encoded
from stages.finetune.answer_loss import sum_answer_loss
from stages.finetune.objectives.protocol import Arrange, Batch, Start


class AnswerRows:
    """One sequence a row, of whose answer each token is learned; what the loss is, a subclass says."""

    sequences_of_row = 1

    def __init__(self, examples: Sequence[Encoded]) -> None:
        self.sequences = examples
        self.lengths: Sequence[int] = [len(example.input_ids) for example in examples]
        self.learned_counts: Sequence[int] = [example.learned_count for example in examples]

    def list_sequences(self, rows: Sequence[int]) -> list[Encoded]:
        """Return the sequences of rows."""
        return [self.sequences[row] for row in rows]

    def prepare(self, model: Any, start: Start) -> None:
        """Do nothing: the loss needs only what there is at each update."""

    def collate(self, rows: Sequence[int], arrange: Arrange) -> Batch:
        """Lay out rows as a batch."""
        layout = arrange(self.list_sequences(rows))
        return Batch(rows, layout, tuple(self.learned_counts[row] for row in rows), layout.targets)

    def record(self, batch: Batch) -> None:
        """Record the pass that learns the rows of a batch."""
        batch.record_layout(batch.layout, sum(self.lengths[row] for row in batch.rows))

    def take_figures(self) -> dict[str, float]:
        """Return nothing: the loss is all that there is to log."""
        return {}

    def measure(self, model: Any, arrange: Arrange) -> None:
        """Return None: what there is to measure of answers, the loss of the validation rows, always is."""
        return


class Answers(AnswerRows):
    """The loss is averaged over the answers' tokens."""

    def compute_loss(self, model: Any, batch: Batch) -> Tensor:
        """Return the sum of the negative log-probabilities of the answers' tokens."""
        self.record(batch)
        return sum_answer_loss(model, batch.layout)
