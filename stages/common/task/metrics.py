"""A metric of a set of answers, as sums over rows: one line of columns a row (see `statistics.intervals`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.common.statistics.intervals import Floats, Statistic

LOSS = "loss"  # per answer token; a model has it whatever its task is


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric over the rows of one model.

    Attributes:
        columns: one line a row; shape (rows, columns).
        statistic: from column sums to the value.
        scale: the largest possible value where the smallest is 0; None for a value without bounds.
    """

    columns: Floats
    statistic: Statistic
    scale: float | None

    def value(self) -> float:
        """Return the value over all rows."""
        return float(self.statistic(self.columns.sum(axis=0)))

    def by_row(self) -> Floats:
        """Return the value of each row on its own."""
        return self.statistic(self.columns)

    def as_share(self) -> Metric:
        """Return the same metric between 0 and 1; one without bounds stays as it is."""
        if self.scale in (None, 1.0):
            return self
        statistic, scale = self.statistic, self.scale
        return Metric(self.columns, lambda sums: statistic(sums) / scale, 1.0)


def compute_perplexity(losses: Sequence[float], tokens: Sequence[int]) -> Metric:
    """Return the perplexity of the reference answers: exp of the mean loss of a token, over all tokens.

    Args:
        losses: summed negative log-likelihood of each row's reference, in nats.
    """
    return Metric(np.stack([np.array(losses), np.array(tokens)], axis=1).astype(float), _exp_ratio, None)


def compute_share(hits: Sequence[bool]) -> Metric:
    """Return the share of rows that hit."""
    return compute_mean([float(hit) for hit in hits], scale=1.0)


def compute_mean(values: Sequence[float], scale: float | None) -> Metric:
    """Return the mean of one value a row."""
    return Metric(
        np.stack([np.array(values, dtype=float), np.ones(len(values))], axis=1), compute_ratio, scale
    )


def compute_ratio(sums: Floats) -> Floats:
    """Return the first column over the second; 1 for nothing of nothing."""
    top, bottom = sums[..., 0], sums[..., 1]
    found: Floats = np.divide(top, bottom, out=np.ones_like(top), where=bottom > 0)
    return found


def _exp_ratio(sums: Floats) -> Floats:
    found: Floats = np.exp(compute_ratio(sums))
    return found
