"""Metrics of classes: accuracy, F1 macro and weighted, one line a class, and the confusion matrix.

They equal scikit-learn's `f1_score` and `precision_recall_fscore_support` over the classes that the
references have. An answer outside the set is a miss of its row's class, and a hit for none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from stages.common.statistics.intervals import Floats, Statistic
from stages.common.task.metrics import Metric

INVALID = "(invalid)"


@dataclass(frozen=True, slots=True)
class ClassResult:
    """How well one class is recognised.

    Attributes:
        rows: test rows of the class.
        answered: test rows that were given this class.
    """

    name: str
    rows: int
    answered: int
    precision: float
    recall: float
    f1: float


def score_f1(answered: Sequence[str | None], expected: Sequence[str]) -> dict[str, Metric]:
    """Return macro and weighted F1: the mean over classes, plain and weighted by their rows.

    A resample of the bootstrap may miss a class; it is then excluded from the mean.
    """
    columns = _count_hits(answered, expected, sorted(set(expected)))
    return {
        "macro_f1": Metric(columns, _macro_f1, 1.0),
        "weighted_f1": Metric(columns, _weighted_f1, 1.0),
    }


def list_classes(answered: Sequence[str | None], expected: Sequence[str]) -> list[ClassResult]:
    """Return the result of each class that a reference or an answer has, by name."""
    names = sorted({*expected, *(name for name in answered if name is not None)})
    hits = Counter(e for a, e in zip(answered, expected, strict=True) if a == e)
    rows, given = Counter(expected), Counter(answered)
    return [
        ClassResult(
            name,
            rows[name],
            given[name],
            precision=hits[name] / given[name] if given[name] else 0.0,
            recall=hits[name] / rows[name] if rows[name] else 0.0,
            f1=2 * hits[name] / (rows[name] + given[name]),
        )
        for name in names
    ]


def count_confusions(answered: Sequence[str | None], expected: Sequence[str]) -> list[tuple[str, str, int]]:
    """Return which class was answered in place of which, and how often, most frequent first."""
    pairs = Counter((e, a or INVALID) for a, e in zip(answered, expected, strict=True) if a != e)
    return sorted(((e, a, n) for (e, a), n in pairs.items()), key=lambda pair: (-pair[2], pair[0], pair[1]))


def _count_hits(answered: Sequence[str | None], expected: Sequence[str], names: Sequence[str]) -> Floats:
    """Return hits, rows and answers of each class, a line a row; shape (rows, 3 * classes)."""
    place = {name: number for number, name in enumerate(names)}
    counts = np.zeros((len(expected), 3, len(names)))
    for row, (given, wanted) in enumerate(zip(answered, expected, strict=True)):
        counts[row, 0, place[wanted]] = given == wanted
        counts[row, 1, place[wanted]] = 1.0
        if given in place:
            counts[row, 2, place[given]] = 1.0
    return counts.reshape(len(expected), 3 * len(names))


def _mean_f1(sums: Floats, weighted: bool) -> Floats:
    hits, rows, answers = np.split(sums, 3, axis=-1)
    both = rows + answers
    f1 = np.divide(2 * hits, both, out=np.zeros_like(hits), where=both > 0)
    weights = rows if weighted else (rows > 0).astype(float)
    total = weights.sum(axis=-1)
    found: Floats = np.divide((f1 * weights).sum(axis=-1), total, out=np.zeros_like(total), where=total > 0)
    return found


_macro_f1: Statistic = partial(_mean_f1, weighted=False)
_weighted_f1: Statistic = partial(_mean_f1, weighted=True)
