"""Learn from pairs of a better and a worse answer (methods dpo and orpo)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from stages.common.chat.preferences import Pair
from stages.common.chat.template import Encoded
from stages.common.spool import join, view
from stages.finetune.batches import plan_batches
from stages.finetune.objectives.log_probabilities import compute_log_probabilities
from stages.finetune.objectives.losses import compute_dpo_losses, compute_orpo_losses
from stages.finetune.objectives.protocol import Arrange, Batch, Start
from stages.finetune.objectives.reference import (
    keep_scores,
    list_first_epoch,
    order_by_row,
    read_id,
    score_batches,
    switch_off_dropout,
)
from stages.finetune.objectives.summary import summarise_pairs

Two = tuple[float, float]  # of the better and the worse answer of a pair


class Pairs:
    """Two sequences a row; the loss is averaged over the pairs.

    Args:
        held_out: pairs that are measured and not learned.
        has_reference: whether a log-probability counts by its difference from the reference's (dpo), or by
            its mean over the answer's tokens (orpo).
    """

    sequences_of_row = 2

    def __init__(
        self, pairs: Sequence[Pair], held_out: Sequence[Pair], beta: float, has_reference: bool
    ) -> None:
        self.pairs, self.held_out, self.beta, self.has_reference = pairs, held_out, beta, has_reference
        self.sequences: Sequence[Encoded] = join(
            view(pairs, attrgetter("chosen")), view(pairs, attrgetter("rejected"))
        )
        sizes = [
            [(len(one.input_ids), one.learned_count) for one in (pair.chosen, pair.rejected)]
            for pair in pairs
        ]
        self.lengths: Sequence[int] = [chosen[0] + rejected[0] for chosen, rejected in sizes]
        self.learned_counts: Sequence[int] = [chosen[1] + rejected[1] for chosen, rejected in sizes]
        self._reference = torch.zeros(len(pairs), 2)
        self._before: list[Two] = []
        self._held_out_batches: list[list[int]] = []

    def list_sequences(self, rows: Sequence[int]) -> list[Encoded]:
        """Return the better and the worse answer of each row."""
        return _list_answers(self.pairs, rows)

    def prepare(self, model: Any, start: Start) -> None:
        """Compute the reference's log-probabilities of all pairs."""
        switch_off_dropout(model)
        batches = list_first_epoch(start.plan, len(self.pairs)) if self.has_reference else []
        lengths = [len(pair.chosen.input_ids) for pair in self.held_out]
        self._held_out_batches = plan_batches(lengths, max(map(len, start.plan)), 1, 0)

        def compute() -> dict[str, list[Any]]:
            scores = score_batches(
                model, batches, self.list_sequences, start.arrange, partial(read_id, self.pairs)
            )
            return {
                "learned": order_by_row(batches, list(map(_pair_up, scores))),
                "held_out": self._score_held_out(model, start.arrange),
            }

        found = keep_scores(start.folder, compute)
        if self.has_reference:
            self._reference = torch.tensor(found["learned"]).view(-1, 2)
        self._before = [(chosen, rejected) for chosen, rejected in found["held_out"]]

    def collate(self, rows: Sequence[int], arrange: Arrange) -> Batch:
        """Lay out rows as a batch: each pair's two answers one after the other."""
        sequences = self.list_sequences(rows)
        learned = tuple(example.learned_count for example in sequences)
        return Batch(rows, arrange(sequences), learned, torch.zeros(len(rows)))

    def compute_loss(self, model: Any, batch: Batch) -> Tensor:
        """Return the sum of the losses of the pairs of a batch."""
        batch.record_layout(batch.layout, sum(self.lengths[row] for row in batch.rows))
        found = compute_log_probabilities(model, batch)
        if not batch.rows:
            return found.sum()
        if self.has_reference:
            reference = self._reference[list(batch.rows)].to(found)
            chosen, rejected = (found.view(-1, 2) - reference).unbind(1)
            return compute_dpo_losses(chosen, rejected, self.beta).sum()
        learned = torch.tensor(batch.learned).to(found)
        chosen, rejected = (found / learned).view(-1, 2).unbind(1)
        return compute_orpo_losses(chosen, rejected, self.beta).sum()

    def take_figures(self) -> dict[str, float]:
        """Return nothing: the loss is all that there is to log."""
        return {}

    def measure(self, model: Any, arrange: Arrange) -> dict[str, Any]:
        """Return the preference accuracy and the rewards on the pairs that were held out."""
        after = [(chosen, rejected) for chosen, rejected in self._score_held_out(model, arrange)]
        if self.has_reference:
            rewards = [
                (self.beta * (one[0] - start[0]), self.beta * (one[1] - start[1]))
                for one, start in zip(after, self._before, strict=True)
            ]
        else:
            rewards = [(self.beta * chosen, self.beta * rejected) for chosen, rejected in after]
        return summarise_pairs(rewards, self._before, after)

    def _score_held_out(self, model: Any, arrange: Arrange) -> list[list[float]]:
        """Return the log-probabilities of both answers of each pair, or their means by token."""
        batches = self._held_out_batches
        scores = score_batches(
            model, batches, partial(_list_answers, self.held_out), arrange, partial(read_id, self.held_out)
        )
        found: list[list[float]] = order_by_row(batches, list(map(_pair_up, scores)))
        if self.has_reference:
            return found
        return [
            [two[0] / pair.chosen.learned_count, two[1] / pair.rejected.learned_count]
            for two, pair in zip(found, self.held_out, strict=True)
        ]


def _list_answers(pairs: Sequence[Pair], rows: Sequence[int]) -> list[Encoded]:
    return [answer for row in rows for pair in [pairs[row]] for answer in (pair.chosen, pair.rejected)]


def _pair_up(scores: Sequence[float]) -> list[list[float]]:
    return [list(two) for two in zip(scores[::2], scores[1::2], strict=True)]
