"""Propose speculative tokens from n-grams of earlier answers.

The model verifies all proposed tokens in one step, which takes hardly longer than a step of one token, and
accepts those that it would have generated itself (speculative decoding, Leviathan et al. 2023). A wrong
proposal costs time but never changes the answer. Answers of a fine-tuned task are repetitive: counts of which
token followed which, given the words of the prompt, predict four of five tokens. A draft model would take as
long as the model itself.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import Any

ORDERS = (8, 6, 5, 4, 3, 2, 1)  # context lengths, the longest known one is used
KEYWORD_ORDER = 3  # context length for which keywords of the prompt are counted
START = -1  # precedes the first token of an answer
PROMPT_TOKENS = 64  # tokens used of a prompt, from its end
UNSEEN = 0.02  # count of a keyword that never occurred with a token
SHARPNESS = 0.5  # keywords are not independent; this calibrates the probabilities

# Fixed cost of a step, in tokens of a large step (30 layers, 2 to 8 cores).
STEP_OVERHEAD_TOKENS = 21

_Context = tuple[int, ...]
_EMPTY: Counter[int] = Counter()


class NgramDrafter:
    """N-gram counts of answers, and proposals from them.

    Args:
        capacity: answers in memory; the oldest is removed for a new one.
    """

    def __init__(self, capacity: int = 20_000) -> None:
        self._capacity = capacity
        self._answers: deque[tuple[frozenset[int], tuple[int, ...]]] = deque()
        self._next: dict[_Context, Counter[int]] = {}
        self._keywords: dict[tuple[_Context, int], Counter[int]] = {}
        self._prompts: Counter[int] = Counter()  # prompts per keyword

    def learn(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Add an answer, with its end token, to the counts."""
        keywords = frozenset(prompt[-PROMPT_TOKENS:])
        self._count(keywords, answer, 1)
        self._answers.append((keywords, tuple(answer)))
        if len(self._answers) > self._capacity:
            self._count(*self._answers.popleft(), -1)

    def get_keywords(self, prompt: Sequence[int]) -> list[int]:
        """Return the distinct tokens of a prompt that at most half of all prompts have."""
        half = len(self._answers) // 2
        return [token for token in dict.fromkeys(prompt[-PROMPT_TOKENS:]) if self._prompts[token] <= half]

    def _count(self, keywords: frozenset[int], answer: Sequence[int], step: int) -> None:
        for keyword in keywords:
            self._prompts[keyword] += step
        known = (START, *answer)
        for at in range(1, len(known)):
            token = known[at]
            for order in ORDERS:
                if order <= at:
                    _add(self._next, known[at - order : at], (token,), step)
            context = known[max(0, at - KEYWORD_ORDER) : at]
            _add(self._keywords, (context, token), keywords, step)

    def propose(
        self, keywords: Sequence[int], answer: Sequence[int], longest: int, minimum: float
    ) -> list[int]:
        """Propose up to `longest` tokens that continue an answer.

        Args:
            keywords: the prompt's, from `get_keywords`.
            minimum: joint probability of the proposed tokens below which the next is not worth verifying.
        """
        known = [START, *answer][-max(ORDERS) :]
        begin, joint = len(known), 1.0
        while len(known) - begin < longest:
            token, probability = self._predict(keywords, tuple(known[-max(ORDERS) :]))
            joint *= probability
            if joint < minimum:
                break
            known.append(token)
        return known[begin:]

    def _predict(self, keywords: Sequence[int], known: _Context) -> tuple[int, float]:
        followers = next(
            (found for order in ORDERS if order <= len(known) and (found := self._next.get(known[-order:]))),
            None,
        )
        if followers is None:
            return START, 0.0
        if len(followers) == 1:
            ((token, count),) = followers.items()
            return token, (count + 0.5) / (count + 1)
        context = known[-KEYWORD_ORDER:]
        return self._predict_by_keywords(keywords, context, self._next.get(context) or followers)

    def _predict_by_keywords(
        self, keywords: Sequence[int], context: _Context, followers: Counter[int]
    ) -> tuple[int, float]:
        """Rank the followers of a context by the keywords they occurred with: naive Bayes."""
        scores = {}
        for token, count in followers.items():
            seen = self._keywords.get((context, token), _EMPTY)
            score = math.log(count) - len(keywords) * math.log(count + 1.0)
            for keyword in keywords:
                score += math.log(seen.get(keyword, 0) + UNSEEN)
            scores[token] = score
        token = max(scores, key=scores.__getitem__)
        total = sum(math.exp((score - scores[token]) * SHARPNESS) for score in scores.values())
        return token, 1 / total


def get_break_even_probability(running: int) -> float:
    """Return the acceptance probability above which a speculative token pays off, with `running` sequences.

    Verifying a token costs 1. If accepted, it saves its sequence's share of a step and a token, so it pays
    off if p * (overhead / running + 1) > 1.
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
