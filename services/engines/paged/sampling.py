"""From a row of logits to a token, one answer at a time."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from services.engines.grammar import Grammar
from services.engines.protocol import Sampling, TokenLogprob

Row = NDArray[np.float32]


class Chooser:
    """Chooses the tokens of one answer, in order.

    It draws one random number a token, whatever was guessed ahead: a seed gives the same answer with and
    without drafts.

    Attributes:
        plain: the likeliest token is the answer's, with nothing to weigh.
    """

    __slots__ = ("_grammar", "_random", "_sampling", "_written", "plain")

    def __init__(self, sampling: Sampling, grammar: Grammar | None) -> None:
        self._sampling = sampling
        self._grammar = grammar
        self._random = np.random.default_rng(sampling.seed)
        self._written: Counter[int] = Counter()
        self.plain = (
            sampling.temperature == 0
            and grammar is None
            and not sampling.frequency_penalty
            and not sampling.presence_penalty
        )

    def choose(self, logits: Row, likeliest: int) -> tuple[int, TokenLogprob | None]:
        """Return the next token, and its log-probability if that was asked for.

        Args:
            likeliest: the token of the highest logit, found for all rows of a step at once.
        """
        sampling = self._sampling
        if self.plain:
            token = likeliest
            return token, None if sampling.logprobs is None else logprob(logits, token, sampling.logprobs)
        scores = self._weighed(logits)
        if sampling.temperature == 0:
            token = int(scores.argmax())
        else:
            token = draw(scores / np.float32(sampling.temperature), sampling.top_p, self._random.random())
        self._written[token] += 1
        if self._grammar is not None:
            self._grammar.take(token)
        return token, None if sampling.logprobs is None else logprob(logits, token, sampling.logprobs)

    def _weighed(self, logits: Row) -> Row:
        sampling = self._sampling
        scores = logits
        if self._written and (sampling.frequency_penalty or sampling.presence_penalty):
            scores = logits.copy()
            for token, times in self._written.items():
                scores[token] -= sampling.presence_penalty + sampling.frequency_penalty * times
        if self._grammar is not None:
            scores = np.where(self._grammar.allowed(), scores, np.float32(-np.inf))
        return scores


def draw(scores: Row, top_p: float, chance: float) -> int:
    """Return the token at `chance` of the distribution, cut to the likeliest with `top_p` together.

    Nucleus sampling (Holtzman et al. 2020).
    """
    weights = np.exp(scores - scores.max(), dtype=np.float64)
    if top_p >= 1:
        sums = np.cumsum(weights)
        return int(min(np.searchsorted(sums, chance * sums[-1], side="right"), len(sums) - 1))
    order = np.argsort(-weights, kind="stable")
    sums = np.cumsum(weights[order])
    kept = int(np.searchsorted(sums, top_p * sums[-1])) + 1
    at = np.searchsorted(sums[:kept], chance * sums[min(kept, len(sums)) - 1], side="right")
    return int(order[min(at, kept - 1)])


def logprob(logits: Row, token: int, alternatives: int) -> TokenLogprob:
    """Return a token's log-probability in the model's own distribution, and those of the likeliest."""
    top = logits.max()
    shares = logits - top
    np.exp(shares, out=shares)  # in float32: this runs for every token, and its sum is right to six digits
    total = float(top) + math.log(float(shares.sum()))
    written = float(logits[token]) - total
    if not alternatives:
        return TokenLogprob(token, written)
    best = np.argpartition(-logits, alternatives)[:alternatives]
    best = best[np.argsort(-logits[best], kind="stable")]
    return TokenLogprob(token, written, tuple((int(other), float(logits[other]) - total) for other in best))
