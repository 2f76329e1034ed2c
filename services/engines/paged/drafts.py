"""Guesses how an answer goes on, from answers that were written before.

The model checks all guessed tokens in one step, which takes hardly longer than a step of one token, and keeps
those it would have written itself (speculative decoding, Leviathan et al. 2023). So a wrong guess costs time
and never a token. A tuned task repeats itself: counts of which token followed which, and in answer to which
words, guess four of five tokens where a draft model would take as long as the model.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import Any

ORDERS = (8, 6, 5, 4, 3, 2, 1)  # tokens before a guess, the longest known context first
WORD_ORDER = 3  # context in which the words of the prompt are weighed
START = -1  # stands before the first token of an answer
PROMPT_TOKENS = 64  # looked at, from the prompt's end
UNSEEN = 0.02  # what a word counts that never came with a token
SHARPNESS = 0.5  # words are not independent; with this, guesses come true as often as they say

# A step takes as long as this many tokens in a large one, plus its tokens (30 layers, 2 to 8 cores).
STEP_OVERHEAD_TOKENS = 21

_Context = tuple[int, ...]
_NOTHING: Counter[int] = Counter()


class Drafts:
    """Counts of what followed what in answers, and guesses from them.

    Args:
        capacity: answers to know; the oldest is forgotten for a new one.
    """

    def __init__(self, capacity: int = 20_000) -> None:
        self._capacity = capacity
        self._answers: deque[tuple[frozenset[int], tuple[int, ...]]] = deque()
        self._next: dict[_Context, Counter[int]] = {}
        self._words: dict[tuple[_Context, int], Counter[int]] = {}
        self._prompts: Counter[int] = Counter()  # that have a word

    def learn(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Count an answer, with the token that ended it, to a prompt."""
        words = frozenset(prompt[-PROMPT_TOKENS:])
        self._count(words, answer, 1)
        self._answers.append((words, tuple(answer)))
        if len(self._answers) > self._capacity:
            self._count(*self._answers.popleft(), -1)

    def words(self, prompt: Sequence[int]) -> list[int]:
        """Return the words of a prompt that tell it from others, each once."""
        half = len(self._answers) // 2
        return [word for word in dict.fromkeys(prompt[-PROMPT_TOKENS:]) if self._prompts[word] <= half]

    def _count(self, words: frozenset[int], answer: Sequence[int], step: int) -> None:
        for word in words:
            self._prompts[word] += step
        known = (START, *answer)
        for at in range(1, len(known)):
            token = known[at]
            for order in ORDERS:
                if order <= at:
                    _add(self._next, known[at - order : at], (token,), step)
            context = known[max(0, at - WORD_ORDER) : at]
            _add(self._words, (context, token), words, step)

    def guess(self, words: Sequence[int], answer: Sequence[int], longest: int, least: float) -> list[int]:
        """Guess up to `longest` tokens that go on an answer.

        Args:
            words: the prompt's, from `words`.
            least: the probability under which a token, with all those before it, is not worth checking.
        """
        known = [START, *answer][-max(ORDERS) :]
        begin, chance = len(known), 1.0
        while len(known) - begin < longest:
            token, likely = self._likeliest(words, tuple(known[-max(ORDERS) :]))
            chance *= likely
            if chance < least:
                break
            known.append(token)
        return known[begin:]

    def _likeliest(self, words: Sequence[int], known: _Context) -> tuple[int, float]:
        followers = next(
            (found for order in ORDERS if order <= len(known) and (found := self._next.get(known[-order:]))),
            None,
        )
        if followers is None:
            return START, 0.0
        if len(followers) == 1:
            ((token, times),) = followers.items()
            return token, (times + 0.5) / (times + 1)
        context = known[-WORD_ORDER:]
        return self._by_words(words, context, self._next.get(context) or followers)

    def _by_words(
        self, words: Sequence[int], context: _Context, followers: Counter[int]
    ) -> tuple[int, float]:
        """Weigh the followers by the words they came with: naive Bayes."""
        scores = {}
        for token, times in followers.items():
            seen = self._words.get((context, token), _NOTHING)
            alone = math.log(times + 1.0)
            score = math.log(times) - len(words) * alone
            for word in words:
                score += math.log(seen.get(word, 0) + UNSEEN)
            scores[token] = score
        token = max(scores, key=scores.__getitem__)
        total = sum(math.exp((score - scores[token]) * SHARPNESS) for score in scores.values())
        return token, 1 / total


def least_chance(running: int) -> float:
    """Return the chance from which a guess is worth its computation, with so many answers in the step.

    A token more costs 1; if it comes true, it saves its answer a share of a step and a token:
    c * (overhead / running + 1) > 1.
    """
    return running / (running + STEP_OVERHEAD_TOKENS)


def _add(counts: dict[Any, Counter[int]], key: Any, items: Iterable[int], step: int) -> None:
    found = counts.get(key)
    if found is None:
        found = counts[key] = Counter()
    for item in items:
        found[item] += step
        if found[item] <= 0:
            del found[item]
    if not found:
        del counts[key]
