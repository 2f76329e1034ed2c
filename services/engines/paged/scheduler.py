"""Continuous batching: plan the tokens of each step, and process its logits."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from services.engines.paged.blocks import BlockPool, PrefixCache
from services.engines.paged.model import PagedModel, StepInput
from services.engines.paged.ngram_drafter import NgramDrafter, get_break_even_probability
from services.engines.protocol import FinishReason, Step, TokenLogprob
from services.engines.sampling import Sampler

MAX_DRAFT_TOKENS = 16
# Of a step, where others generate: a token's log-probabilities take longer than the token itself.
MAX_SCORED_TOKENS = 16


@dataclass(slots=True, eq=False)
class ActiveSequence:
    """A prompt and its answer so far.

    Attributes:
        tokens: the prompt's, then the answer's.
        limit: length, with the prompt, at which the answer is cut.
        keywords: tokens of the prompt that condition the drafter.
        computed: tokens whose keys and values are in `blocks`.
        admitted: sequence number of the admission.
        prompt_logprobs: of the prompt's tokens so far, from the second; None where they are not wanted.
        hidden_sum: of the prompt's tokens so far; None where no vector is wanted.
    """

    tokens: list[int]
    prompt_tokens: int
    limit: int
    sampler: Sampler
    keywords: list[int]
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    admitted: int = 0
    prompt_logprobs: list[TokenLogprob] | None = None
    hidden_sum: NDArray[np.float64] | None = None

    @property
    def is_scored(self) -> bool:
        """Whether something is wanted of each token of the prompt."""
        return self.prompt_logprobs is not None or self.hidden_sum is not None


@dataclass(slots=True)
class _Planned:
    """The tokens of one sequence in a step.

    Attributes:
        new: known tokens that are not computed yet.
        draft: speculative tokens after them.
        samples: `new` reaches the end of the known tokens, so the step yields the next token.
    """

    sequence: ActiveSequence
    new: list[int]
    draft: list[int]
    samples: bool


class Scheduler:
    """Decode sequences together, one step at a time.

    Sequences that are generating come first, each with one token and a draft; the rest of the step's token
    budget prefills prompts, in order of arrival. If blocks run out, finished sequences are evicted from the
    prefix cache; then the sequence admitted last is preempted and recomputed later.

    Args:
        step_tokens: token budget of a step; long prompts are prefilled in chunks.
        drafter: proposes speculative tokens; None decodes one token per step.
    """

    def __init__(
        self, model: PagedModel, *, step_tokens: int, end_ids: frozenset[int], drafter: NgramDrafter | None
    ) -> None:
        self._model = model
        self._pool = BlockPool(model.blocks)
        self._prefixes = PrefixCache(self._pool)
        self._drafter = drafter
        self._step_tokens = step_tokens
        self._end_ids = end_ids
        self._waiting: deque[ActiveSequence] = deque()
        self._running: list[ActiveSequence] = []
        self._admissions = 0
        self.drafted = 0  # speculative tokens so far
        self.accepted = 0  # of them, accepted ones
        self.preempted = 0  # times that a sequence lost its blocks

    @property
    def free_blocks(self) -> int:
        """Blocks in use by neither a sequence nor the prefix cache."""
        return self._pool.free

    def add(self, prompt: Sequence[int], limit: int, sampler: Sampler) -> ActiveSequence:
        """Queue a prompt whose answer is cut at `limit` tokens, prompt included."""
        keywords = self._drafter.get_keywords(prompt) if self._drafter else []
        sequence = ActiveSequence(list(prompt), len(prompt), limit, sampler, keywords)
        if sampler.scores_prompt:
            sequence.prompt_logprobs = []
        if sampler.embeds_prompt:
            sequence.hidden_sum = np.zeros(self._model.shape.hidden)
        self._waiting.append(sequence)
        return sequence

    def remove(self, sequence: ActiveSequence) -> None:
        """Remove a sequence; its blocks stay in the prefix cache."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        else:
            self._running.remove(sequence)
            self._prefixes.keep(sequence.tokens[: sequence.computed], sequence.blocks)

    def step(self) -> list[tuple[ActiveSequence, Step | Exception]]:
        """Compute a step; return the sequences that have new tokens, with them, or with why they ended."""
        self._admit()
        plan = self._plan()
        if not plan:
            return []
        logits = self._model.step([_make_input(planned) for planned in plan])
        best: list[int] = logits.argmax(axis=-1).tolist()
        results: list[tuple[ActiveSequence, Step | Exception]] = []
        row = 0
        for planned in plan:
            rows = _count_rows(planned)
            sequence = planned.sequence
            scored = max(0, rows - len(planned.draft) - 1) if planned.samples else rows
            self._score_prompt(planned, logits[row : row + scored])
            self._add_hidden(planned, row)
            sequence.computed += len(planned.new)
            row, rows = row + scored, rows - scored
            if rows:
                try:
                    step = self._verify(planned, logits[row : row + rows], best[row : row + rows])
                except Exception as error:  # of its sampler or grammar, so the others go on
                    self._discard(sequence)
                    results.append((sequence, error))
                else:
                    results.append((sequence, step))
                    if step.finish_reason is not None:
                        self.remove(sequence)
                row += rows
        return results

    def _discard(self, sequence: ActiveSequence) -> None:
        """Remove a failed sequence; its keys and values may be wrong, so no other sequence reuses them."""
        self._running.remove(sequence)
        self._pool.give_back(sequence.blocks)

    # Admission.

    def _admit(self) -> None:
        while self._waiting:
            sequence = self._waiting[0]
            if not self._free_blocks(self._count_blocks(len(sequence.tokens) + 1)):
                return
            self._waiting.popleft()
            sequence.admitted = self._admissions = self._admissions + 1
            self._running.append(sequence)
            self._reuse(sequence)

    def _reuse(self, sequence: ActiveSequence) -> None:
        """Reuse the blocks of a finished sequence: full ones are shared, rows of the last one are copied."""
        if sequence.is_scored:  # there are no logits of tokens that are not computed
            return
        length, blocks = self._prefixes.find(sequence.tokens)
        length = min(length, len(sequence.tokens) - 1)  # the last token is computed anyway, for its logits
        whole, rows = divmod(length, self._model.block_tokens)
        sequence.blocks = blocks[:whole]
        self._pool.share(sequence.blocks)
        sequence.computed = whole * self._model.block_tokens
        if rows and self._pool.free:
            block = self._pool.take()
            self._model.copy_rows(blocks[whole], block, rows)
            sequence.blocks.append(block)
            sequence.computed = length

    def _count_blocks(self, tokens: int) -> int:
        return -(-tokens // self._model.block_tokens)

    def _free_blocks(self, blocks: int) -> bool:
        while self._pool.free < blocks:
            if not self._prefixes.drop_oldest():
                return False
        return True

    # Planning.

    def _plan(self) -> list[_Planned]:
        """Choose the tokens of the step, generating sequences first."""
        budget = self._step_tokens
        generating = sum(1 for s in self._running if s.computed == len(s.tokens) - 1)
        plan: dict[int, _Planned] = {}
        scored = MAX_SCORED_TOKENS if generating else budget
        # Sequences with one token to compute generate; the others prefill.
        for sequence in sorted(self._running, key=lambda s: (s.computed < len(s.tokens) - 1, s.admitted)):
            room = min(budget, scored) if sequence.is_scored else budget
            if room < 1:
                continue
            planned = self._plan_sequence(sequence, room, generating)
            if self._allocate(planned, plan):
                plan[id(sequence)] = planned
                budget -= len(planned.new) + len(planned.draft)
                scored -= len(planned.new) if sequence.is_scored else 0
        return list(plan.values())

    def _plan_sequence(self, sequence: ActiveSequence, budget: int, generating: int) -> _Planned:
        new = sequence.tokens[sequence.computed : sequence.computed + budget]
        samples = sequence.computed + len(new) == len(sequence.tokens)
        draft: list[int] = []
        if samples and self._drafter is not None:
            # One token is left for every other generating sequence.
            room = min(
                MAX_DRAFT_TOKENS, budget - len(new) - generating, sequence.limit - len(sequence.tokens) - 1
            )
            answer = sequence.tokens[sequence.prompt_tokens :]
            minimum = get_break_even_probability(max(generating, 1))
            draft = self._drafter.propose(sequence.keywords, answer, room, minimum)
        return _Planned(sequence, new, draft, samples)

    def _allocate(self, planned: _Planned, plan: dict[int, _Planned]) -> bool:
        """Allocate the blocks of a planned sequence, preempting the sequence admitted last if need be."""
        sequence = planned.sequence
        if sequence not in self._running:  # preempted in this step
            return False
        while True:
            end = sequence.computed + len(planned.new) + len(planned.draft)
            needed = self._count_blocks(end) - len(sequence.blocks)
            if self._free_blocks(needed):
                sequence.blocks += [self._pool.take() for _ in range(needed)]
                return True
            if planned.draft:
                planned.draft = []
                continue
            youngest = max(self._running, key=lambda s: s.admitted)
            self._preempt(youngest)
            plan.pop(id(youngest), None)
            if youngest is sequence:
                return False

    def _preempt(self, sequence: ActiveSequence) -> None:
        self._pool.give_back(sequence.blocks)
        sequence.blocks, sequence.computed = [], 0
        self._running.remove(sequence)
        self._waiting.appendleft(sequence)
        self.preempted += 1

    # Results.

    def _verify(self, planned: _Planned, logits: NDArray[np.float32], best: list[int]) -> Step:
        """Sample tokens row by row, for as long as the draft predicted them."""
        sequence, sampler = planned.sequence, planned.sequence.sampler
        tokens: list[int] = []
        logprobs: list[TokenLogprob] = []
        reason: FinishReason | None = None
        for row, likeliest in enumerate(best):
            token, logprob = sampler.sample(logits[row], likeliest)
            if token in self._end_ids:
                reason = "stop"
                break
            sequence.tokens.append(token)
            tokens.append(token)
            if logprob is not None:
                logprobs.append(logprob)
            if len(sequence.tokens) >= sequence.limit:
                reason = "length"
                break
            if row == len(planned.draft) or token != planned.draft[row]:
                break
            sequence.computed += 1
        if reason is not None and self._drafter is not None and sequence.hidden_sum is None:
            answer = sequence.tokens[sequence.prompt_tokens :]
            last = [token] if reason == "stop" else []
            self._drafter.learn(sequence.tokens[: sequence.prompt_tokens], [*answer, *last])
        self.drafted += len(planned.draft)
        self.accepted += row
        end = logprob if reason == "stop" else None
        prompt = tuple(sequence.prompt_logprobs or ())
        sequence.prompt_logprobs = None  # they are sent once
        vector = None
        if sequence.hidden_sum is not None:
            vector = tuple((sequence.hidden_sum / sequence.prompt_tokens).tolist())
            sequence.hidden_sum = None
        return Step(tuple(tokens), reason, tuple(logprobs), prompt_logprobs=prompt, end=end, embedding=vector)

    def _score_prompt(self, planned: _Planned, logits: NDArray[np.float32]) -> None:
        """Keep the log-probabilities of the prompt's tokens that follow the new ones.

        Args:
            logits: of the new tokens, but for the prompt's last.
        """
        sequence = planned.sequence
        if sequence.prompt_logprobs is None:
            return
        del sequence.prompt_logprobs[sequence.computed :]  # computed once more after a preemption
        for place, row in enumerate(logits, start=sequence.computed + 1):
            sequence.prompt_logprobs.append(sequence.sampler.score(row, sequence.tokens[place]))

    def _add_hidden(self, planned: _Planned, row: int) -> None:
        """Add the hidden states of new tokens, whose rows begin at `row`."""
        sequence = planned.sequence
        if sequence.hidden_sum is None:
            return
        if sequence.computed == 0:  # also after a preemption
            sequence.hidden_sum[:] = 0
        rows = self._model.hidden[row : row + len(planned.new)]
        sequence.hidden_sum += rows.sum(axis=0, dtype=np.float64)


def _make_input(planned: _Planned) -> StepInput:
    sequence = planned.sequence
    tokens = [*planned.new, *planned.draft]
    return StepInput(tokens, sequence.computed, sequence.blocks, _count_rows(planned))


def _count_rows(planned: _Planned) -> int:
    """Return of how many tokens, from the last, the logits are needed."""
    if _is_scored(planned):
        return len(planned.new) + len(planned.draft)
    return len(planned.draft) + 1 if planned.samples else 0


def _is_scored(planned: _Planned) -> bool:
    """Return whether the new tokens are of a prompt of which each token's row is wanted."""
    sequence = planned.sequence
    return sequence.is_scored and sequence.computed < sequence.prompt_tokens
