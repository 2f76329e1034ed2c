"""Test whether a version does worse for users than another: four criteria, permuted by user.

Compared are shares of the answered requests: failures (status 5xx), invalid answers, thumbs down,
corrections. Shares of all requests, and not of those with feedback: users who write only when an answer is
wrong would make every share 1.

The test permutes users (else sessions, else requests) between the two sides. It is one-sided, and corrected
by Holm over the criteria.

Thumbs and corrections are votes, and names of users are what a key's holder chooses. So where several API
keys ask, what follows from votes must also follow without any one key, with its votes and its requests: none
ends a canary alone. Failures and invalid answers are measured by the service, and count from everyone.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flows.release.outcomes import RequestOutcome
from stages.common.statistics.association import apply_holm
from stages.common.statistics.intervals import Floats, compute_sequential_p_values

# Permutations for one threshold: enough that the smallest p-value of all criteria is well below it.
PER_THRESHOLD = 5
MIN_PERMUTATIONS, MAX_PERMUTATIONS = 2000, 100_000
FIRST_PERMUTATIONS = 500  # then as many again, while a p-value can still become small
CHUNK = 2_000_000  # random numbers in memory at once
SEED = 7

MAX_VOTERS = 10  # keys with the most votes or requests, without each of which a verdict must hold
VOTES = {"thumb_down": "thumb_down_at", "corrected": "corrected_at"}

CRITERIA = (
    ("failed", "do requests fail?"),
    ("invalid", "do answers lose their form?"),
    ("thumb_down", "do users dislike the answers?"),
    ("corrected", "do users correct the answers?"),
)


@dataclass(frozen=True, slots=True)
class CanaryCriterion:
    """One respect in which the version may be worse.

    Attributes:
        value: share of its requests; baseline: share of those of the version it is compared with.
        passed: the p-value is above the threshold, or the votes are those of one API key alone.
        p_value: probability of such a difference by chance, corrected for all criteria (Holm).
        threshold: the analysis' share of alpha; a p-value above it passes.
    """

    name: str
    question: str
    value: float
    baseline: float
    p_value: float
    threshold: float
    passed: bool
    summary: str


def compare(
    new: Sequence[RequestOutcome], old: Sequence[RequestOutcome], alpha: float
) -> tuple[CanaryCriterion, ...]:
    """Test every criterion that is known on both sides, at a family-wise level of `alpha`."""
    return tuple(_hold_without_one_key(found, new, old, alpha) for found in _compare(new, old, alpha))


def _hold_without_one_key(
    found: CanaryCriterion, new: Sequence[RequestOutcome], old: Sequence[RequestOutcome], alpha: float
) -> CanaryCriterion:
    """Return a criterion, passed if it failed by the votes or requests of one key though others ask, too."""
    if found.passed or found.name not in VOTES or len({one.key for one in (*new, *old)}) < 2:
        return found
    voters = Counter(one.key for one in new if getattr(one, VOTES[found.name]) is not None)
    # Requests without votes weigh, too: many of them make the other side's share small.
    askers = Counter(one.key for one in old)
    for key in dict.fromkeys(key for count in (voters, askers) for key, _ in count.most_common(MAX_VOTERS)):
        ours, theirs = ([one for one in side if one.key != key] for side in (new, old))
        if key not in voters and not (ours and theirs):
            continue  # its requests are all that there is to compare with
        rest = {one.name: one for one in _compare(ours, theirs, alpha)} if ours and theirs else {}
        if found.name not in rest or rest[found.name].passed:
            # None of the votes decides now: the summary counts them by voter.
            summary = (
                f"{found.summary}, by {_name_part(voters, key)} of {_name_voter(key)} alone: not decisive "
                f"(votes: {_describe_votes(voters)})"
            )
            return replace(found, passed=True, summary=summary)
    return found


def _name_part(voters: Mapping[str | None, int], key: str | None) -> str:
    return "the votes" if key in voters else "the requests"


def _name_voter(key: str | None) -> str:
    return f"the key {key}" if key else "requests without a key"


def _describe_votes(voters: Mapping[str | None, int]) -> str:
    """Return the number of votes of each voter, the most first."""
    ordered = sorted(voters.items(), key=lambda voter: (-voter[1], voter[0] or ""))
    parts = [f"{votes} of {_name_voter(key)}" for key, votes in ordered[:MAX_VOTERS]]
    if len(ordered) > MAX_VOTERS:
        parts.append(f"{sum(votes for _, votes in ordered[MAX_VOTERS:])} of other keys")
    return ", ".join(parts)


def _compare(
    new: Sequence[RequestOutcome], old: Sequence[RequestOutcome], alpha: float
) -> tuple[CanaryCriterion, ...]:
    sums, is_new = _sum_by_user(new, old)
    if math.comb(len(is_new), int(is_new.sum())) < _count_permutations(len(CRITERIA), alpha):
        # So few users have too few permutations for any small p-value. Requests are then taken as
        # independent, which rejects a good version too often, and passes no bad one.
        sums, is_new = _sum_by_user(_separate(new), _separate(old))
    # For each criterion: how many were bad, and of how many.
    bad, known = sums[:, : len(CRITERIA)], sums[:, len(CRITERIA) :]
    sides = [(bad[side].sum(axis=0), known[side].sum(axis=0)) for side in (is_new, ~is_new)]
    tested = [place for place in range(len(CRITERIA)) if all(counts[place] > 0 for _, counts in sides)]
    p_values = apply_holm(_permutation_p_values(bad[:, tested], known[:, tested], is_new, alpha).tolist())
    shares = [[bads[place] / counts[place] for place in tested] for bads, counts in sides]
    return tuple(
        _criterion(CRITERIA[place], shares[0][n], shares[1][n], p_values[n], alpha)
        for n, place in enumerate(tested)
    )


def _criterion(
    criterion: tuple[str, str], value: float, baseline: float, p_value: float, alpha: float
) -> CanaryCriterion:
    name, question = criterion
    return CanaryCriterion(
        name=name,
        question=question,
        value=float(value),
        baseline=float(baseline),
        p_value=p_value,
        threshold=alpha,
        passed=p_value > alpha,
        summary=(
            f"{name.replace('_', ' ')}: {value:.1%} of its requests, {baseline:.1%} of the baseline's "
            f"(p = {p_value:.4f})"
        ),
    )


def _sum_by_user(
    new: Sequence[RequestOutcome], old: Sequence[RequestOutcome]
) -> tuple[Floats, NDArray[np.bool_]]:
    """Return the sums of each user on each side, and which of them are on the new side."""
    sums: defaultdict[tuple[bool, str], Floats] = defaultdict(lambda: np.zeros(2 * len(CRITERIA)))
    for is_new, side in ((True, new), (False, old)):
        for one in side:
            answered = float(not one.failed)
            bad = (
                float(one.failed),
                float(one.valid is False),
                float(one.thumb_down_at is not None),
                float(one.corrected_at is not None),
            )
            known = (1.0, float(one.valid is not None), answered, answered)
            sums[is_new, one.assignment_key] += np.array([*bad, *known])
    return np.array(list(sums.values())), np.array([is_new for is_new, _ in sums], dtype=bool)


def _separate(outcomes: Sequence[RequestOutcome]) -> list[RequestOutcome]:
    """Return the outcomes as if each came from a user of its own, but one vote of a kind for each user."""
    voted: set[tuple[str, str]] = set()
    separate = []
    for number, one in enumerate(outcomes):
        again = [field for field in VOTES.values() if (one.assignment_key, field) in voted]
        voted |= {(one.assignment_key, field) for field in VOTES.values() if getattr(one, field) is not None}
        cleared: dict[str, Any] = dict.fromkeys(again)
        separate.append(replace(one, assignment_key=str(number), **cleared))
    return separate


def _permutation_p_values(bad: Floats, known: Floats, is_new: NDArray[np.bool_], alpha: float) -> Floats:
    """Return the one-sided p-value of each criterion, with users permuted between the sides.

    Draws end as soon as no criterion could come down to `alpha` any more, so no decision depends on it.
    """
    users, ours = len(is_new), int(is_new.sum())
    permutations = _count_permutations(bad.shape[1], alpha)
    observed = _difference(is_new[None, :].astype(np.float64), bad, known)[0]
    rng = np.random.default_rng(SEED)

    def count_as_bad(rows: int) -> Floats:
        drawn = np.zeros((rows, users))
        chosen = np.argpartition(rng.random((rows, users)), ours - 1, axis=1)[:, :ours]
        np.put_along_axis(drawn, chosen, 1.0, axis=1)
        as_bad: Floats = (_difference(drawn, bad, known) >= observed - 1e-12).sum(axis=0)
        return as_bad

    return compute_sequential_p_values(
        count_as_bad,
        permutations,
        enough=alpha * (1 + permutations),
        first=FIRST_PERMUTATIONS,
        at_once=max(1, CHUNK // users),
    )


def _count_permutations(criteria: int, alpha: float) -> int:
    wanted = math.ceil(PER_THRESHOLD * max(1, criteria) / alpha)
    return min(MAX_PERMUTATIONS, max(MIN_PERMUTATIONS, wanted))


def _difference(drawn: Floats, bad: Floats, known: Floats) -> Floats:
    """Return the share of bad ones on the new side minus that on the other: shape (drawn, criteria)."""
    ours_bad, ours = drawn @ bad, drawn @ known
    theirs_bad, theirs = bad.sum(axis=0) - ours_bad, known.sum(axis=0) - ours
    shares = [
        np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
        for top, bottom in ((ours_bad, ours), (theirs_bad, theirs))
    ]
    # A side with nothing known makes no difference.
    found: Floats = np.where((ours > 0) & (theirs > 0), shares[0] - shares[1], 0.0)
    return found
