"""Learn from answers that people found good or bad (method kto)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from stages.common.chat.preferences import RatedAnswer
from stages.common.chat.template import Encoded
from stages.common.spool import view
from stages.finetune.batches import plan_batches
from stages.finetune.devices.group import gather
from stages.finetune.objectives.log_probabilities import compute_log_probabilities, sum_log_probabilities
from stages.finetune.objectives.losses import compute_kto_losses
from stages.finetune.objectives.protocol import Arrange, Batch, Start
from stages.finetune.objectives.reference import (
    keep_scores,
    list_first_epoch,
    order_by_row,
    read_id,
    score_batches,
    switch_off_dropout,
)
from stages.finetune.objectives.summary import summarise_ratings


class Ratings:
    """One sequence a row; the loss is averaged over the answers.

    The divergence from the reference is estimated at each update, from the batch's prompts with each other's
    answers. Which answer a prompt gets is that of another row of its batch of the first epoch, or of the next
    batch where all of its own are to that prompt.

    Args:
        held_out: answers that are measured and not learned.
        weights: of good and of bad answers.
    """

    sequences_of_row = 1

    def __init__(
        self,
        answers: Sequence[RatedAnswer],
        held_out: Sequence[RatedAnswer],
        beta: float,
        weights: tuple[float, float],
    ) -> None:
        self.answers, self.held_out, self.beta, self.weights = answers, held_out, beta, weights
        self.sequences: Sequence[Encoded] = view(answers, attrgetter("answer"))
        self.lengths: Sequence[int] = [len(example.input_ids) for example in self.sequences]
        self.learned_counts: Sequence[int] = [example.learned_count for example in self.sequences]
        self._is_desirable = torch.tensor([one.is_desirable for one in answers])
        self._partners: dict[int, int] = {}
        self._reference = torch.zeros(len(answers))
        self._others_reference: list[float] = []
        self._before: list[float] = []
        self._held_out_batches: list[list[int]] = []

    def list_sequences(self, rows: Sequence[int]) -> list[Encoded]:
        """Return the sequences of rows."""
        return [self.sequences[row] for row in rows]

    def prepare(self, model: Any, start: Start) -> None:
        """Compute the reference's log-probabilities of all answers, and of those of other prompts."""
        switch_off_dropout(model)
        batches = list_first_epoch(start.plan, len(self.answers))
        self._partners = choose_partners(batches, [one.row.group for one in self.answers])
        lengths = [len(one.answer.input_ids) for one in self.held_out]
        self._held_out_batches = plan_batches(lengths, max(map(len, start.plan)), 1, 0)

        def compute() -> dict[str, list[Any]]:
            learned, others = (
                score_batches(model, batches, listed, start.arrange, partial(read_id, self.answers))
                for listed in (self.list_sequences, self._list_others)
            )
            return {
                "learned": order_by_row(batches, learned),
                "others": order_by_row(batches, others),
                "held_out": self._score_held_out(model, start.arrange),
            }

        found = keep_scores(start.folder, compute)
        self._reference = torch.tensor(found["learned"])
        self._others_reference, self._before = found["others"], found["held_out"]

    def collate(self, rows: Sequence[int], arrange: Arrange) -> Batch:
        """Lay out rows as a batch, and beside it their prompts with others' answers."""
        layout = arrange(self.list_sequences(rows))
        learned = tuple(self.learned_counts[row] for row in rows)
        return Batch(rows, layout, learned, torch.zeros(len(rows)), arrange(self._list_others(rows)))

    def compute_loss(self, model: Any, batch: Batch) -> Tensor:
        """Return the sum of the losses of the answers of a batch."""
        divergence = self._estimate_divergence(model, batch)
        batch.record_layout(batch.layout, sum(self.lengths[row] for row in batch.rows))
        found = compute_log_probabilities(model, batch)
        if not batch.rows:
            return found.sum()
        rows = list(batch.rows)
        ratios = found - self._reference[rows].to(found)
        is_desirable = self._is_desirable[rows].to(found.device)
        return compute_kto_losses(ratios, is_desirable, divergence, self.beta, self.weights).sum()

    def take_figures(self) -> dict[str, float]:
        """Return nothing: the loss is all that there is to log."""
        return {}

    def measure(self, model: Any, arrange: Arrange) -> dict[str, Any]:
        """Return how well rewards separate good from bad answers, on those that were held out."""
        after = self._score_held_out(model, arrange)
        rewards = [self.beta * (one - start) for one, start in zip(after, self._before, strict=True)]
        rated = list(zip(rewards, (one.is_desirable for one in self.held_out), strict=True))
        good = [reward for reward, is_desirable in rated if is_desirable]
        return summarise_ratings(good, [reward for reward, is_desirable in rated if not is_desirable])

    def _estimate_divergence(self, model: Any, batch: Batch) -> float:
        """Return the mean log(policy / reference) of prompts with others' answers, at least 0.

        It is that of the rows of all processes, which must all call it.
        """
        total = 0.0
        if batch.others:
            batch.record_layout(batch.others, reader=model)
            learned = [example.learned_count for example in self._list_others(batch.rows)]
            with torch.no_grad():
                found = sum_log_probabilities(model, batch.others, learned).tolist()
            total = sum(found) - sum(self._others_reference[row] for row in batch.rows)
        shares = gather((total, len(batch.rows)))
        return max(0.0, sum(share for share, _ in shares) / sum(rows for _, rows in shares))

    def _list_others(self, rows: Sequence[int]) -> list[Encoded]:
        """Return the prompt of each row with another's answer, no longer than the longest row."""
        longest = max(self.lengths)
        return [_exchange(self.sequences[row], self.sequences[self._partners[row]], longest) for row in rows]

    def _score_held_out(self, model: Any, arrange: Arrange) -> list[float]:
        batches, answers = self._held_out_batches, self.held_out
        scores = score_batches(
            model,
            batches,
            lambda rows: [answers[row].answer for row in rows],
            arrange,
            partial(read_id, answers),
        )
        return order_by_row(batches, scores)


def choose_partners(batches: Sequence[Sequence[int]], groups: Sequence[str]) -> dict[int, int]:
    """Return for each row the one whose answer its prompt gets, to estimate the divergence.

    The set of the answers of a batch stays the same: each row's answer goes to the next row, the last one's
    to the first. Rows of a group have one prompt, so its rows come together, and go to the group after it.
    A row that would get an answer to its own prompt (one that is alone in a short last batch: its own, which
    says nothing of the divergence) gets that of the next row in the plan to another prompt, if there is one.

    Args:
        groups: of each row.
    """
    partners: dict[int, int] = {}
    for batch in batches:
        by_group: dict[str, list[int]] = {}
        for row in batch:
            by_group.setdefault(groups[row], []).append(row)
        order = [row for rows in sorted(by_group.values(), key=len, reverse=True) for row in rows]
        # Shifted by as many places as the largest group has, no row meets its own group, if that can be.
        shift = max(map(len, by_group.values())) % len(order) or min(1, len(order) - 1)
        partners |= {row: order[place - shift] for place, row in enumerate(order)}
    strangers = find_strangers([row for batch in batches for row in batch], groups)
    own = (row for row, other in partners.items() if groups[row] == groups[other])
    return partners | {row: strangers[row] for row in own if row in strangers}


def find_strangers(order: Sequence[int], groups: Sequence[str]) -> dict[int, int]:
    """Return for each row the next one of another group, behind the last the first; none if there is none."""
    found: dict[int, int] = {}
    following: int | None = None
    before: int | None = None  # the row that comes after the one that is looked at
    for row in [*order, *order][::-1]:
        if before is not None and groups[before] != groups[row]:
            following = before
        if following is not None:
            found[row] = following
        before = row
    return found


def _exchange(example: Encoded, other: Encoded, longest: int) -> Encoded:
    """Return the prompt of one example with the answer of another, cut to a length."""
    prompt = example.input_ids[: example.prompt_length]
    return Encoded((prompt + other.input_ids[other.prompt_length :])[:longest], len(prompt))
