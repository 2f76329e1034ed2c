"""Answer many prompts at once without a server: greedy answers, and the loss of reference answers.

The reference is the draft: a step computes a prompt with its reference, which gives the loss of every
reference token and, as far as the model would have written the reference itself, the answer (speculative
decoding, Leviathan et al. 2023). A reference that differs costs computation and never changes a token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from services.engines.paged.blocks import BlockPool
from services.engines.paged.model import PagedModel, StepInput
from stages.common.chat.common_prefix import count_common_prefix

STEP_TOKENS = 512  # computed in a step, at most
RUNNING = 128  # sequences decoded together, at most


@dataclass(frozen=True, slots=True)
class Completion:
    """A greedy answer.

    Attributes:
        token_ids: without the token that ended it.
        ended: whether the model ended it; if not, it was cut.
        reference_nll: summed negative log-likelihood of the reference in nats; 0 without one.
    """

    token_ids: tuple[int, ...]
    ended: bool
    reference_nll: float


@dataclass(slots=True, eq=False)
class _Sequence:
    """A prompt, its reference, and the answer so far.

    Attributes:
        given: tokens to read: the prompt, then the reference without its last token.
        computed: tokens whose keys and values `blocks` hold.
        best: the likeliest token at each place of the answer that has been read.
    """

    number: int
    given: list[int]
    prompt_tokens: int
    reference: Sequence[int]
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    best: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    nll: float = 0.0

    def reads(self) -> bool:
        return self.computed < len(self.given)

    def next_run(self, budget: int) -> StepInput:
        """Return the next tokens to compute: of what is given, else the last one written."""
        if not self.reads():
            return StepInput([self.answer[-1]], self.prompt_tokens + len(self.answer) - 1, self.blocks, 1)
        new = self.given[self.computed : self.computed + budget]
        end = self.computed + len(new)
        return StepInput(new, self.computed, self.blocks, min(len(new), max(0, end - self.prompt_tokens + 1)))


def answer_offline(
    model: PagedModel,
    prompts: Sequence[Sequence[int]],
    references: Sequence[Sequence[int]] | None,
    end_ids: Collection[int],
    max_new_tokens: int,
    on_progress: Callable[[int], None] = lambda done: None,
    running: int = RUNNING,
) -> list[Completion]:
    """Return the greedy answer to each prompt, in order; equal arguments give equal answers.

    Args:
        references: answers to score, each with its end token; None scores nothing.
        end_ids: tokens that end an answer.
        max_new_tokens: where an answer is cut, its end token counted.
        on_progress: called with the number of answers so far.
        running: sequences computed together, at most.
    """
    pool = BlockPool(model.blocks)
    prefix = _common_prefix(prompts)
    prefix_blocks = _compute_prefix(model, pool, prefix)
    lengths = [len(prompt) for prompt in prompts]
    scored = [len(reference) for reference in references] if references else [0] * len(lengths)
    waiting = deque(sorted(range(len(lengths)), key=lambda i: -lengths[i]))
    active: list[_Sequence] = []
    done: dict[int, Completion] = {}
    while waiting or active:
        while waiting and len(active) < running:
            room = lengths[waiting[0]] + max(max_new_tokens, scored[waiting[0]])
            if active and pool.free < _blocks_for(room, model):
                break
            number = waiting.popleft()
            # Its token ids are copied no earlier: those of all prompts may not fit into memory.
            sequence = _sequence(number, prompts[number], references[number] if references else ())
            _begin(sequence, model, pool, prefix_blocks, len(prefix), room)
            active.append(sequence)
        runs = list(_plan(active))
        logits = model.step([run for _, run in runs])
        row = 0
        for sequence, run in runs:
            _take(sequence, run, logits[row : row + run.rows], end_ids, max_new_tokens)
            row += run.rows
        for sequence in [s for s in active if _is_done(s, end_ids, max_new_tokens)]:
            active.remove(sequence)
            pool.give_back(sequence.blocks)
            done[sequence.number] = _completion(sequence, end_ids)
        on_progress(len(done))
    return [done[i] for i in range(len(lengths))]


def _sequence(number: int, prompt: Sequence[int], reference: Sequence[int]) -> _Sequence:
    return _Sequence(number, [*prompt, *reference[:-1]], len(prompt), reference)


def _plan(active: Sequence[_Sequence]) -> Iterator[tuple[_Sequence, StepInput]]:
    """Yield what a step computes: a token of each answer, and what is given as far as there is room."""
    budget = STEP_TOKENS
    for sequence in sorted(active, key=_Sequence.reads):
        if budget < 1:
            return
        run = sequence.next_run(budget)
        budget -= len(run.token_ids)
        yield sequence, run


def _take(
    sequence: _Sequence,
    run: StepInput,
    logits: NDArray[np.float32],
    end_ids: Collection[int],
    max_new_tokens: int,
) -> None:
    """Take over what a step computed for a sequence."""
    likeliest: list[int] = logits.argmax(axis=-1).tolist()
    if not sequence.reads():
        sequence.answer.append(likeliest[0])
        return
    sequence.computed += len(run.token_ids)
    if run.rows and sequence.reference:
        place = len(sequence.best)
        sequence.nll += _nll(logits, sequence.reference[place : place + run.rows])
    sequence.best += likeliest
    if not sequence.reads():
        sequence.answer = _accepted(sequence.best, sequence.reference, end_ids)[:max_new_tokens]


def _accepted(best: Sequence[int], reference: Sequence[int], end_ids: Collection[int]) -> list[int]:
    """Return what the model writes: the reference as far as it agrees, then its own next token."""
    for place, token in enumerate(best):
        if token in end_ids or place >= len(reference) or token != reference[place]:
            return list(best[: place + 1])
    return list(best)


def _nll(logits: NDArray[np.float32], targets: Sequence[int]) -> float:
    """Return the summed negative log-likelihood of the targets, one for each row."""
    top = logits.max(axis=-1)
    total = np.exp(logits - top[:, None]).sum(axis=-1, dtype=np.float64)
    wanted = logits[np.arange(len(targets)), list(targets)]
    return float((np.log(total) + top - wanted).sum())


def _is_done(sequence: _Sequence, end_ids: Collection[int], max_new_tokens: int) -> bool:
    if not sequence.answer:
        return False
    return sequence.answer[-1] in end_ids or len(sequence.answer) >= max_new_tokens


def _completion(sequence: _Sequence, end_ids: Collection[int]) -> Completion:
    ended = sequence.answer[-1] in end_ids
    return Completion(tuple(sequence.answer[: -1 if ended else None]), ended, sequence.nll)


# The common beginning of the prompts, computed once.


def _common_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Return the tokens that all prompts begin with; each keeps one of its own, for its logits."""
    if len(prompts) < 2:
        return []
    length = min(count_common_prefix(prompts), *(max(0, len(prompt) - 1) for prompt in prompts))
    return list(prompts[0][:length])


def _compute_prefix(model: PagedModel, pool: BlockPool, prefix: Sequence[int]) -> list[int]:
    blocks = [pool.take() for _ in range(_blocks_for(len(prefix), model))]
    for begin in range(0, len(prefix), STEP_TOKENS):
        model.step([StepInput(prefix[begin : begin + STEP_TOKENS], begin, blocks, 0)])
    return blocks


def _begin(
    sequence: _Sequence, model: PagedModel, pool: BlockPool, prefix: list[int], length: int, room: int
) -> None:
    """Give a sequence its blocks: whole ones of the prefix are shared, rows of its last one are copied."""
    whole, rows = divmod(length, model.block_tokens)
    sequence.blocks = prefix[:whole]
    pool.share(sequence.blocks)
    sequence.blocks += [pool.take() for _ in range(_blocks_for(room, model) - whole)]
    if rows:
        model.copy_rows(prefix[whole], sequence.blocks[whole], rows)
    sequence.computed = length


def _blocks_for(tokens: int, model: PagedModel) -> int:
    return -(-tokens // model.block_tokens)
