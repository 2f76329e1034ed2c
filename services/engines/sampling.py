"""Sample the next token from logits, for engines that decode in this process."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from services.engines.protocol import EngineError, Sampling, SchemaUnsupported, TokenLogprob

if TYPE_CHECKING:
    from services.engines.grammar import Grammar

Logits = NDArray[np.float32]


class Sampler:
    """Samples the tokens of one answer, in order.

    One random number is drawn per token, whatever was speculated, so that a seed gives the same answer with
    and without speculative tokens. Log-probabilities are the model's own: before temperature, penalties and
    grammar.

    Args:
        end_ids: tokens that end the answer.
        grammar: constrains the answer; None for any text.

    Attributes:
        greedy: the token with the highest logit is taken, with no penalty and no grammar.
    """

    __slots__ = ("_counts", "_end_ids", "_grammar", "_random", "_sampling", "greedy")

    def __init__(self, sampling: Sampling, end_ids: Sequence[int], grammar: Grammar | None) -> None:
        self._sampling = sampling
        self._end_ids = list(end_ids)
        self._grammar = grammar
        self._counts: Counter[int] = Counter()
        seed = sampling.seed
        # numpy takes no negative seed; this gives each of the 64-bit integers its own.
        self._random = np.random.default_rng(None if seed is None else seed % 2**64)
        penalised = bool(sampling.frequency_penalty or sampling.presence_penalty)
        self.greedy = sampling.temperature <= 0 and grammar is None and not penalised

    @property
    def needs_logits(self) -> bool:
        """Whether the likeliest token alone is not enough."""
        return not self.greedy or self._sampling.logprobs is not None

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the prompt are wanted."""
        return self._sampling.prompt_logprobs

    @property
    def embeds_prompt(self) -> bool:
        """Whether the mean of the prompt's hidden states is wanted."""
        return self._sampling.embeds_prompt

    def score(self, logits: Logits, token: int) -> TokenLogprob:
        """Return the log-probability of a token of the prompt."""
        return compute_logprob(logits, token, self._sampling.logprobs or 0)

    def sample(self, logits: Logits, likeliest: int) -> tuple[int, TokenLogprob | None]:
        """Return the next token, and its log-probability if that was requested.

        Args:
            logits: shape (vocabulary,).
            likeliest: the token with the highest logit, which engines find for a whole batch at once.

        Raises:
            EngineError: the logits are not finite, or the grammar allows no token.
            SchemaUnsupported: the grammar outgrew its limits.
        """
        token = self._take_greedy(logits, likeliest) if self.greedy else self._sample(logits)
        count = self._sampling.logprobs
        return token, None if count is None else compute_logprob(logits, token, count)

    def _take_greedy(self, logits: Logits, likeliest: int) -> int:
        _check_finite(logits[likeliest])
        return likeliest

    def _sample(self, logits: Logits) -> int:
        scores = self._apply_grammar(self._apply_penalties(logits))
        token = int(scores.argmax())
        _check_finite(scores[token])
        if self._sampling.temperature > 0:
            scaled = (scores - scores[token]) / np.float32(self._sampling.temperature)
            token = draw_token(scaled, self._sampling.top_p, self._random.random())
        self._counts[token] += 1
        if self._grammar is not None and token not in self._end_ids:
            self._grammar.take(token)
        return token

    def _apply_penalties(self, logits: Logits) -> Logits:
        sampling = self._sampling
        if not self._counts or not (sampling.frequency_penalty or sampling.presence_penalty):
            return logits
        scores = logits.copy()
        for token, count in self._counts.items():
            scores[token] -= sampling.frequency_penalty * count + sampling.presence_penalty
        return scores

    def _apply_grammar(self, scores: Logits) -> Logits:
        if self._grammar is None:
            return scores
        allowed = self._grammar.allowed()
        # The grammar knows one end token; where it allows that, any of them ends the answer.
        allowed[self._end_ids] = allowed[self._end_ids].any()
        if not allowed.any():
            raise SchemaUnsupported("the JSON schema allows no way to go on with this answer")
        return np.where(allowed, scores, np.float32(-np.inf))


def draw_token(scores: Logits, top_p: float, uniform: float) -> int:
    """Draw a token from softmax(scores), cut to the likeliest tokens that reach `top_p` together.

    Nucleus sampling (Holtzman et al. 2020).

    Args:
        uniform: a random number in [0, 1).
    """
    weights = np.exp(scores - scores.max(), dtype=np.float64)
    if top_p >= 1:
        order, sums = None, np.cumsum(weights)
    else:
        order = np.argsort(-weights, kind="stable")
        sums = np.cumsum(weights[order])
        sums = sums[: int(np.searchsorted(sums, top_p * sums[-1])) + 1]
    place = int(np.searchsorted(sums, uniform * sums[-1], side="right"))
    place = min(
        place, int(np.searchsorted(sums, sums[-1]))
    )  # rounding may reach past the last possible token
    return place if order is None else int(order[place])


def compute_logprob(logits: Logits, token: int, alternatives: int) -> TokenLogprob:
    """Return the log-probability of a token under the model, and those of the likeliest tokens."""
    top = logits.max()
    shares = logits - top
    np.exp(shares, out=shares)  # float32, for speed: runs for every token, and the sum is exact to six digits
    total = float(top) + math.log(float(shares.sum()))
    own = float(logits[token]) - total
    if not alternatives:
        return TokenLogprob(token, own)
    best = np.argpartition(-logits, min(alternatives, len(logits) - 1))[:alternatives]
    best = best[np.argsort(-logits[best], kind="stable")]
    return TokenLogprob(token, own, tuple((int(other), float(logits[other]) - total) for other in best))


def _check_finite(score: np.float32) -> None:
    if not math.isfinite(score):
        raise EngineError("the logits leave no token to choose")
