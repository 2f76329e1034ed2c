"""From logits to the next token, for engines that compute in this process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from services.engines.protocol import Sampling, TokenLogprob

if TYPE_CHECKING:
    import numpy as np

    from services.engines.grammar import Grammar


class Chooser:
    """Chooses one answer's tokens one after the other.

    Log-probabilities are the model's own: of the logits before temperature, penalties and schema.

    Args:
        end_ids: tokens that end the answer.
        grammar: what the answer must fit, or None.
    """

    __slots__ = ("_counts", "_end_ids", "_grammar", "_random", "_sampling")

    def __init__(self, sampling: Sampling, end_ids: Sequence[int], grammar: Grammar | None) -> None:
        import numpy as np

        self._sampling = sampling
        self._end_ids = list(end_ids)
        self._grammar = grammar
        self._counts: Counter[int] = Counter()
        self._random = np.random.default_rng(sampling.seed)

    @property
    def takes_likeliest(self) -> bool:
        """Return whether the token is the largest logit, and nothing else is wanted."""
        wanted = self._sampling
        plain = wanted.temperature <= 0 and wanted.logprobs is None and self._grammar is None
        return plain and not wanted.frequency_penalty and not wanted.presence_penalty

    def choose(self, logits: np.ndarray) -> tuple[int, TokenLogprob | None]:
        """Return the next token and, if it was asked for, its log-probability.

        Args:
            logits: float32, shape (vocabulary,).

        Raises:
            ValueError: the logits are not numbers, or the schema leaves no token.
        """
        import numpy as np

        scores = self._penalised(logits)
        if self._grammar is not None:
            allowed = self._grammar.allowed()
            allowed[self._end_ids] = allowed[self._end_ids].any()
            scores = np.where(allowed, scores, -np.inf)
        token = int(scores.argmax())
        if not np.isfinite(scores[token]):
            raise ValueError("the model's logits leave no token to choose")
        if self._sampling.temperature > 0:
            token = self._draw(scores)
        self._counts[token] += 1
        if self._grammar is not None and token not in self._end_ids:
            self._grammar.take(token)
        return token, self._logprob(logits, token)

    def _penalised(self, logits: np.ndarray) -> np.ndarray:
        wanted = self._sampling
        if not self._counts or not (wanted.frequency_penalty or wanted.presence_penalty):
            return logits
        scores = logits.copy()
        for token, count in self._counts.items():
            scores[token] -= wanted.frequency_penalty * count + wanted.presence_penalty
        return scores

    def _draw(self, scores: np.ndarray) -> int:
        """Draw among the likeliest tokens that together reach `top_p`."""
        import numpy as np

        weights = np.exp((scores - scores.max()).astype(np.float64) / self._sampling.temperature)
        order = np.argsort(-weights, kind="stable")
        reached = np.cumsum(weights[order])
        kept = int(np.searchsorted(reached, self._sampling.top_p * reached[-1])) + 1
        kept = min(kept, int(np.count_nonzero(weights)))
        place = np.searchsorted(reached[:kept], self._random.random() * reached[kept - 1], side="right")
        return int(order[min(int(place), kept - 1)])

    def _logprob(self, logits: np.ndarray, token: int) -> TokenLogprob | None:
        import numpy as np

        count = self._sampling.logprobs
        if count is None:
            return None
        wide = logits.astype(np.float64)
        nats = wide - (wide.max() + np.log(np.exp(wide - wide.max()).sum()))
        best = np.argpartition(-nats, min(count, len(nats) - 1))[:count]
        best = best[np.argsort(-nats[best], kind="stable")]
        return TokenLogprob(token, float(nats[token]), tuple((int(i), float(nats[i])) for i in best))
