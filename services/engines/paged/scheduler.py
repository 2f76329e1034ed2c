"""Which tokens the next step computes, and what becomes of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from services.engines.paged.blocks import BlockPool, PrefixCache
from services.engines.paged.drafts import Drafts, least_chance
from services.engines.paged.model import PagedModel, Run
from services.engines.paged.sampling import Chooser
from services.engines.protocol import FinishReason, Step, TokenLogprob

LONGEST_DRAFT = 16


@dataclass(slots=True, eq=False)
class Answer:
    """A prompt and its answer so far.

    Attributes:
        tokens: of the prompt, then of the answer.
        limit: tokens at which the answer is cut.
        computed: tokens whose keys and values `blocks` hold.
        words: the prompt's, for drafts.
    """

    tokens: list[int]
    prompt_tokens: int
    limit: int
    chooser: Chooser
    words: list[int]
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    admitted: int = 0  # number among the admissions


@dataclass(slots=True)
class _Planned:
    sequence: Answer
    new: list[int]  # not computed yet
    draft: list[int]
    ends: bool  # `new` are all that is known of the sequence, so a token can be chosen behind it


class Scheduler:
    """Decodes sequences together, one step at a time.

    Sequences that have begun to answer go first, each with a token and a draft; what is left of the step's
    tokens reads prompts, in the order they came. If blocks run out, ended sequences are dropped from the
    prefix cache, then the sequence admitted last waits and is computed anew.

    Args:
        step_tokens: computed in a step, at most. A long prompt is read in pieces.
        drafts: None writes a token a step.
    """

    def __init__(
        self, model: PagedModel, *, step_tokens: int, end_ids: frozenset[int], drafts: Drafts | None
    ) -> None:
        self._model = model
        self._pool = BlockPool(model.blocks)
        self._prefixes = PrefixCache(self._pool)
        self._drafts = drafts
        self._step_tokens = step_tokens
        self._end_ids = end_ids
        self._waiting: deque[Answer] = deque()
        self._running: list[Answer] = []
        self._admissions = 0
        self.drafted = 0  # tokens guessed so far
        self.accepted = 0  # of them, tokens that came true
        self.sent_back = 0  # times that a sequence lost its blocks

    @property
    def free_blocks(self) -> int:
        """Blocks that neither a sequence nor the prefix cache holds."""
        return self._pool.free

    def add(self, prompt: Sequence[int], limit: int, chooser: Chooser) -> Answer:
        """Take in a prompt whose answer ends at `limit` tokens, prompt included."""
        words = self._drafts.words(prompt) if self._drafts else []
        sequence = Answer(list(prompt), len(prompt), limit, chooser, words)
        self._waiting.append(sequence)
        return sequence

    def remove(self, sequence: Answer) -> None:
        """Forget a sequence, and keep what it computed for prompts that begin alike."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        else:
            self._running.remove(sequence)
            self._prefixes.keep(sequence.tokens[: sequence.computed], sequence.blocks)

    def step(self) -> list[tuple[Answer, Step]]:
        """Compute a step; return what is new of each sequence that has something new."""
        self._admit()
        plan = self._plan()
        if not plan:
            return []
        logits = self._model.step([_run(planned) for planned in plan])
        best: list[int] = logits.argmax(axis=-1).tolist()
        written, row = [], 0
        for planned in plan:
            rows = len(planned.draft) + 1 if planned.ends else 0
            sequence = planned.sequence
            sequence.computed += len(planned.new)
            if rows:
                step = self._write(planned, logits[row : row + rows], best[row : row + rows])
                written.append((sequence, step))
                row += rows
                if step.finish_reason is not None:
                    self.remove(sequence)
        return written

    # Admission.

    def _admit(self) -> None:
        while self._waiting:
            sequence = self._waiting[0]
            if not self._find_room(self._blocks_for(len(sequence.tokens) + 1)):
                return
            self._waiting.popleft()
            sequence.admitted = self._admissions = self._admissions + 1
            self._running.append(sequence)
            self._reuse(sequence)

    def _reuse(self, sequence: Answer) -> None:
        """Begin with the blocks of an ended sequence: whole ones shared, the last one's rows copied."""
        length, blocks = self._prefixes.find(sequence.tokens)
        length = min(length, len(sequence.tokens) - 1)  # the last token is computed for its logits
        whole, rows = divmod(length, self._model.block_tokens)
        sequence.blocks = blocks[:whole]
        self._pool.share(sequence.blocks)
        sequence.computed = whole * self._model.block_tokens
        if rows and self._pool.free:
            block = self._pool.take()
            self._model.copy_rows(blocks[whole], block, rows)
            sequence.blocks.append(block)
            sequence.computed = length

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._model.block_tokens)

    def _find_room(self, blocks: int) -> bool:
        while self._pool.free < blocks:
            if not self._prefixes.drop_oldest():
                return False
        return True

    # What is computed next.

    def _plan(self) -> list[_Planned]:
        """Choose the step's tokens; sequences in the order of `_running`."""
        budget = self._step_tokens
        answering = sum(1 for s in self._running if s.computed == len(s.tokens) - 1)
        plan: dict[int, _Planned] = {}
        # Those with one token to compute write; the others read.
        for sequence in sorted(self._running, key=lambda s: (s.computed < len(s.tokens) - 1, s.admitted)):
            if budget < 1:
                break
            planned = self._share(sequence, budget, answering)
            if self._provide(planned, plan):
                plan[id(sequence)] = planned
                budget -= len(planned.new) + len(planned.draft)
        return list(plan.values())

    def _share(self, sequence: Answer, budget: int, answering: int) -> _Planned:
        new = sequence.tokens[sequence.computed : sequence.computed + budget]
        ends = sequence.computed + len(new) == len(sequence.tokens)
        draft: list[int] = []
        if ends and self._drafts is not None:
            # A place is left for every other sequence that writes.
            room = min(
                LONGEST_DRAFT, budget - len(new) - answering, sequence.limit - len(sequence.tokens) - 1
            )
            answer = sequence.tokens[sequence.prompt_tokens :]
            draft = self._drafts.guess(sequence.words, answer, room, least_chance(max(answering, 1)))
        return _Planned(sequence, new, draft, ends)

    def _provide(self, planned: _Planned, plan: dict[int, _Planned]) -> bool:
        """Get the blocks that a share needs, if need be from the sequence admitted last."""
        sequence = planned.sequence
        if sequence not in self._running:  # it lost its blocks to another in this step
            return False
        while True:
            end = sequence.computed + len(planned.new) + len(planned.draft)
            needed = self._blocks_for(end) - len(sequence.blocks)
            if self._find_room(needed):
                sequence.blocks += [self._pool.take() for _ in range(needed)]
                return True
            if planned.draft:
                planned.draft = []
                continue
            youngest = max(self._running, key=lambda s: s.admitted)
            self._send_back(youngest)
            plan.pop(id(youngest), None)
            if youngest is sequence:
                return False

    def _send_back(self, sequence: Answer) -> None:
        self._pool.give_back(sequence.blocks)
        sequence.blocks, sequence.computed = [], 0
        self._running.remove(sequence)
        self._waiting.appendleft(sequence)
        self.sent_back += 1

    # What was computed.

    def _write(self, planned: _Planned, logits: NDArray[np.float32], best: list[int]) -> Step:
        """Choose tokens row by row, as long as the draft foretold them."""
        sequence, chooser = planned.sequence, planned.sequence.chooser
        tokens: list[int] = []
        logprobs: list[TokenLogprob] = []
        reason: FinishReason | None = None
        for row, likeliest in enumerate(best):
            token, logprob = chooser.choose(logits[row], likeliest)
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
        if reason is not None and self._drafts is not None:
            written = sequence.tokens[sequence.prompt_tokens :]
            end = [token] if reason == "stop" else []
            self._drafts.learn(sequence.tokens[: sequence.prompt_tokens], [*written, *end])
        self.drafted += len(planned.draft)
        self.accepted += row
        return Step(tuple(tokens), reason, tuple(logprobs))


def _run(planned: _Planned) -> Run:
    rows = len(planned.draft) + 1 if planned.ends else 0
    sequence = planned.sequence
    return Run([*planned.new, *planned.draft], sequence.computed, sequence.blocks, rows)
