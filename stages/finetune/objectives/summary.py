"""How far a model prefers the better answers, on pairs or ratings that it did not learn."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from statistics import fmean
from typing import Any


def summarise_pairs(
    rewards: Sequence[tuple[float, float]],
    before: Sequence[tuple[float, float]],
    after: Sequence[tuple[float, float]],
) -> dict[str, Any]:
    """Return the preference accuracy, the rewards and their margin, of pairs of a better and a worse answer.

    Args:
        rewards: of both answers; an accuracy of 0.5 is chance.
        before: log-probabilities of both answers when training started, and after it: which one is likelier.
    """
    if not rewards:
        return {"pairs": 0}
    chosen, rejected = (fmean(values) for values in zip(*rewards, strict=True))
    return {
        "pairs": len(rewards),
        "accuracy": _share_first(rewards),
        "margin": chosen - rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "likelier_before": _share_first(before),
        "likelier_after": _share_first(after),
    }


def summarise_ratings(good: Sequence[float], bad: Sequence[float]) -> dict[str, Any]:
    """Return the rewards of good and bad answers, their margin, and how well rewards separate them.

    `accuracy` is the share of all pairs of a good and a bad answer in which the good one has the higher
    reward: the area under the ROC curve; 0.5 is chance.
    """
    found: dict[str, Any] = {"good": len(good), "bad": len(bad)}
    if not good or not bad:
        return found
    ordered = sorted(bad)
    lower = sum(bisect_left(ordered, reward) + bisect_right(ordered, reward) for reward in good) / 2
    return found | {
        "accuracy": lower / (len(good) * len(bad)),
        "margin": fmean(good) - fmean(bad),
        "chosen_reward": fmean(good),
        "rejected_reward": fmean(bad),
    }


def _share_first(pairs: Sequence[tuple[float, float]]) -> float:
    """Return the share of pairs whose first value is higher; equal values count half."""
    return fmean((first > second) + 0.5 * (first == second) for first, second in pairs)
