"""How many rows a data set needs, and what a test of its size can detect.

The rules behind `auto` in `params.yaml`:

- a test has at least as many rows as make the smallest p-value of an exact paired test (sign test: 2 · 0.5^n
  for n rows that all favour one model) significant: 6 for a confidence of 95 %. With fewer rows no
  difference whatever is significant.
- training has at least 10 rows, the least that OpenAI's fine-tuning takes, and one of each class.
- the curated rows are as many as give both sides that many, at the fractions of the split.
- a test asks at most as many rows as give a share an interval of ±2 points at its widest, at a share of one
  half: n = z² / 4h² (Wilson 1927; Cochran 1977), 2,401 for a confidence of 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from stages.common.statistics.intervals import Interval

CONFIDENCE = 0.95
POWER = 0.8
HALF_WIDTH = 0.02
MIN_TRAIN_ROWS = 10


@dataclass(frozen=True, slots=True)
class Resolution:
    """What a test can detect.

    Attributes:
        width: of the interval around the tuned model's primary metric, as a share of its scale.
        detectable: the smallest difference to another model that the test detects with power `POWER`.
        statement: both in a sentence.
    """

    width: float
    detectable: float
    statement: str


def choose_min_test_rows(given: int | Literal["auto"]) -> int:
    """Return the least number of test rows."""
    return given if given != "auto" else math.ceil(1.0 - math.log2(1.0 - CONFIDENCE))


def choose_min_train_rows(given: int | Literal["auto"], classes: int) -> int:
    """Return the least number of training rows; `classes` is 0 where answers have none."""
    return given if given != "auto" else max(MIN_TRAIN_ROWS, classes)


def choose_min_rows(
    given: int | Literal["auto"], test_fraction: float, validation_fraction: float, classes: int
) -> int:
    """Return the least number of curated rows."""
    if given != "auto":
        return given
    for_test = choose_min_test_rows("auto") / test_fraction
    for_training = choose_min_train_rows("auto", classes) / (1.0 - test_fraction - validation_fraction)
    return math.ceil(max(for_test, for_training))


def choose_max_test_rows(given: int | Literal["auto"] | None) -> int | None:
    """Return how many test rows are asked at most; None for all."""
    return given if given != "auto" else math.ceil(_z(CONFIDENCE) ** 2 / (4.0 * HALF_WIDTH**2))


def describe_resolution(
    metric: str, found: Interval, scale: float, confidence: float, rows: int, groups: Sequence[str]
) -> Resolution:
    """Return what the test can detect, from the interval around the tuned model's metric.

    The smallest detectable difference is (z(1 - alpha/2) + z(power)) standard errors of a difference (Bloom
    1995, Evaluation Review 19), and that of two models' difference is taken as √2 times the interval's: as
    if their answers were independent. Answers of related models agree more, so this errs on the safe side.
    """
    z = _z(confidence)
    width = (found.high - found.low) / scale
    detectable = min(1.0, (z + _z(2.0 * POWER - 1.0)) * math.sqrt(2.0) * width / (2.0 * z))
    number = len(set(groups))
    statement = (
        f"On {rows:,} test rows in {number:,} groups the {confidence:.0%} interval of {metric} is "
        f"{100 * width:.1f} points wide. Another model must differ by {100 * detectable:.1f} points for this "
        f"test to detect it with a probability of {POWER:.0%}; smaller differences are mostly missed."
    )
    return Resolution(round(width, 6), round(detectable, 6), statement)


def _z(confidence: float) -> float:
    """Return the two-sided quantile of the normal distribution."""
    return NormalDist().inv_cdf(0.5 + confidence / 2.0)
