"""Learn from rewards of the model's own answers, compared in groups of one prompt (method grpo).

Shao et al. 2024, DeepSeekMath (arXiv 2402.03300), section 4. Every group is sampled by the model as it is at
the update that learns from it, so the ratio of the new to the old policy is 1 at each update and its clipping
never cuts; what is sampled of a row follows from the seed and the update, so that a run that resumes samples
the same, and so do several processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from stages.common.chat.calls import read_answer
from stages.common.chat.template import Encoded, end_of_turn_ids
from stages.common.model.generation import sample_answers
from stages.common.model.replaced import list_trained
from stages.common.records import Row
from stages.finetune.devices.group import gather
from stages.finetune.objectives.log_probabilities import read_log_probabilities
from stages.finetune.objectives.losses import compare_in_groups, compute_grpo_losses
from stages.finetune.objectives.protocol import Arrange, Batch, Pass, Start
from stages.finetune.objectives.reference import switch_off_dropout
from stages.finetune.objectives.rewards import CHECKS, COMPARED, Checks
from stages.finetune.progress.validation import attending
from stages.finetune.shared_prefix import Layout

LENGTH = "answer_tokens"  # the figure of the length of a sampled answer


class Groups:
    """As many sampled answers a row as a group has; the loss is averaged over the answers.

    Args:
        rows: with the references; examples: their token ids.
        limit: tokens after which an answer is cut.
        kl_weight: of the divergence from the start; with 0 it is not computed.
        epsilon: by which the ratio of the policies may differ from 1.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        examples: Sequence[Encoded],
        tokenizer: Any,
        checks: Checks,
        group_size: int,
        limit: int,
        temperature: float,
        kl_weight: float,
        epsilon: float,
        seed: int,
    ) -> None:
        self.rows, self.tokenizer, self.checks = rows, tokenizer, checks
        self.sequences_of_row, self.limit, self.temperature = group_size, limit, temperature
        self.kl_weight, self.epsilon, self.seed = kl_weight, epsilon, seed
        self._prompts = [example.input_ids[: example.prompt_length] for example in examples]
        self.sequences: Sequence[Encoded] = [
            Encoded(prompt + [tokenizer.pad_token_id] * limit, len(prompt)) for prompt in self._prompts
        ]
        # What an answer will be is not known: the reference's length stands for it.
        self.lengths: Sequence[int] = [group_size * len(example.input_ids) for example in examples]
        self.learned_counts: Sequence[int] = [group_size * example.learned_count for example in examples]
        self._start: dict[str, Tensor] = {}
        self._arrange: Arrange
        self._attention = ""
        self._figures: list[dict[str, float]] = []

    def list_sequences(self, rows: Sequence[int]) -> list[Encoded]:
        """Return as many sequences of the greatest length as will be sampled."""
        return [self.sequences[row] for row in rows for _ in range(self.sequences_of_row)]

    def prepare(self, model: Any, start: Start) -> None:
        """Keep the weights that training starts from, where the divergence from them counts."""
        switch_off_dropout(model)
        self._arrange, self._attention = start.arrange, start.attention
        if self.kl_weight:
            self._start = {name: weight.detach().clone() for name, weight in list_trained(model).items()}

    def collate(self, rows: Sequence[int], arrange: Arrange) -> Batch:
        """Return the prompts of rows; their answers do not exist before the update."""
        layout = arrange([Encoded([*self._prompts[row], 0], len(self._prompts[row])) for row in rows])
        return Batch(rows, layout, (), torch.zeros(len(rows) * self.sequences_of_row))

    def compute_loss(self, model: Any, batch: Batch) -> Tensor:
        """Sample a group for each prompt of a batch, and return the sum of the losses of the answers.

        A model that has no answers, because its probabilities are not numbers, has such a loss.
        """
        if not batch.rows:
            batch.record_layout(batch.layout)
            return batch.layout.answer_logits(model).sum()
        try:
            answers = self._sample(model, batch)
        except FloatingPointError:
            return batch.layout.answer_logits(model).sum() * torch.nan
        batch.record(self._count_sampling(model, batch.rows, answers))
        rewards = self._reward(batch.rows, answers)
        advantages = compare_in_groups(torch.tensor(rewards), self.sequences_of_row).to(batch.units.device)
        sequences = [
            Encoded([*self._prompts[row], *tokens], len(self._prompts[row]))
            for row, group in zip(batch.rows, answers, strict=True)
            for tokens in group
        ]
        layout = self._arrange(sequences).to(batch.units.device)
        lengths = [one.learned_count for one in sequences]
        reference = None
        if self.kl_weight:
            batch.record_layout(layout, reader=model)
            with torch.no_grad(), self._at_start(model):
                reference = self._read(model, layout)
        batch.record_layout(layout, sum(len(one.input_ids) for one in sequences))
        found = self._read(model, layout)
        each = compute_grpo_losses(
            found,
            found.detach(),
            advantages.repeat_interleave(torch.tensor(lengths, device=found.device)),
            self.epsilon,
            reference,
            self.kl_weight,
        )
        return torch.stack([part.mean() for part in each.split(lengths)]).sum()

    def take_figures(self) -> dict[str, float]:
        """Return the mean reward and length of the answers, and the share that passed each check.

        `compared` is the share of groups whose answers differ in worth, which alone teach something. There
        is nothing to tell of a model that has no answers.
        """
        found = [figures for share in gather(self._figures) for figures in share]
        self._figures = []
        names = ("reward", *CHECKS, COMPARED, LENGTH) if found else ()
        return {name: fmean(figures[name] for figures in found) for name in names}

    def measure(self, model: Any, arrange: Arrange) -> None:
        """Return None: the validation rows are asked of every method."""
        return

    def _sample(self, model: Any, batch: Batch) -> list[list[list[int]]]:
        """Return the answers of the group of each row, as token ids with their end of turn."""
        own = getattr(model, "module", model)  # of several processes each samples by itself
        numbers = torch.stack([self._draw_numbers(row, batch.place) for row in batch.rows])
        prompts = [self._prompts[row] for row in batch.rows]
        was_training = own.training
        own.eval()
        try:
            with attending(own, self._attention):
                return sample_answers(own, self.tokenizer, prompts, self.temperature, numbers)
        finally:
            own.train(was_training)

    def _draw_numbers(self, row: int, place: tuple[int, int]) -> Tensor:
        """Return the numbers that the group of a row is sampled with; shape (group, tokens of an answer)."""
        generator = torch.Generator()
        generator.manual_seed(hash((self.seed, *place, row)) % 2**63)
        return torch.rand(self.sequences_of_row, self.limit, generator=generator)

    def _count_sampling(
        self, model: Any, rows: Sequence[int], answers: Sequence[Sequence[list[int]]]
    ) -> Pass:
        """Return what was computed to sample answers: each prompt once, and each token by itself."""
        prompts = len(rows) * max(len(self._prompts[row]) for row in rows)
        written = sum(len(tokens) for group in answers for tokens in group)
        return Pass(1, prompts + written, written, reader=model)

    def _read(self, model: Any, layout: Layout) -> Tensor:
        """Return the log-probability of each token of the answers, by the policy that samples them."""
        return read_log_probabilities(layout.answer_logits(model), layout.targets, self.temperature)

    def _reward(self, rows: Sequence[int], answers: Sequence[Sequence[list[int]]]) -> list[float]:
        ends = end_of_turn_ids(self.tokenizer)
        rewards = []
        for number, group in zip(rows, answers, strict=True):
            row = self.rows[number]
            texts = [
                read_answer(self.tokenizer, tokens[:-1], bool(row.tools)) if tokens[-1] in ends else None
                for tokens in group
            ]
            passed = [self.checks.run(row, text) for text in texts]
            own = [self.checks.weigh(one) for one in passed]
            is_compared = float(max(own) != min(own))
            self._figures += [
                {"reward": reward, **one, COMPARED: is_compared, LENGTH: float(len(tokens))}
                for reward, one, tokens in zip(own, passed, group, strict=True)
            ]
            rewards += own
        return rewards

    @contextmanager
    def _at_start(self, model: Any) -> Iterator[None]:
        """Give the model the weights that training started from inside the block."""
        trained = list_trained(getattr(model, "module", model))
        now = {name: weight.detach().clone() for name, weight in trained.items()}
        try:
            for name, weight in trained.items():
                weight.data.copy_(self._start[name])
            yield
        finally:
            for name, weight in trained.items():
                weight.data.copy_(now[name])
