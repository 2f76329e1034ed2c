"""False alarms and detection delay of the canary and the bake period, on simulated users.

The simulated users differ in their rates and ask several times each. Half of them give feedback, with a
delay. Verdicts are polled over time, at all interim analyses. Parameters are the shipped ones.

Run: `python -m benchmarks.canary` (minutes on two cores) or `python -m benchmarks.canary --quick`
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from benchmarks.machine import machine
from flows.release.canary import ANALYSES, Kind, Trial, analyse
from flows.release.outcomes import RequestOutcome
from stages.common.params.loading import load_params
from stages.common.statistics.intervals import compute_clopper_pearson

PARAMS = load_params()
SETTLE_S = PARAMS.monitoring.window.settle_s
# No timeout: its decision is a setting, not a statistic.
SETTINGS = PARAMS.flows.retrain.canary.model_copy(update={"max_minutes": 1e9})
USERS = 125
STEP_S = 10.0  # between two requests, on average
SPEAKERS = 0.5  # share of the users who ever give feedback
HABIT = 8.0  # a user's rate is drawn from a beta distribution of this precision
CRITERIA = ("failed", "invalid", "thumb_down", "corrected")
USUAL = (0.0, 0.03, 0.05, 0.10)  # shares of all requests, in the order of CRITERIA
FEEDBACK = 2  # from this place on, users have to say it


@dataclass(frozen=True, slots=True)
class Scenario:
    """One kind of comparison, with the rates of the judged version."""

    name: str
    kind: Kind
    rates: tuple[float, ...] = USUAL
    same_users: bool = False


GOOD = (
    Scenario("trial", "canary"),
    Scenario("bake period, new users", "bake"),
    Scenario("bake period, the same users before and after", "bake", same_users=True),
)
WORSE = {
    "failures 0 → 5 %": (0.05, 0.03, 0.05, 0.10),
    "invalid answers 3 → 13 %": (0.0, 0.13, 0.05, 0.10),
    "thumbs down 5 → 20 %": (0.0, 0.03, 0.20, 0.10),
    "corrections 10 → 25 %": (0.0, 0.03, 0.05, 0.25),
}
BAD = (
    *(Scenario(f"trial: {name}", "canary", rates) for name, rates in WORSE.items()),
    *(
        Scenario(f"bake period, the same users: {name}", "bake", rates, same_users=True)
        for name, rates in WORSE.items()
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print tables in Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.canary", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the trials")
    parts = 10 if parser.parse_args(arguments).quick else 1
    # Before NumPy starts in the children: two processes with two threads each would only wait.
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
    print(f"```\n{machine()}\n```\n")
    with ProcessPoolExecutor(os.cpu_count() or 1, mp_context=get_context("spawn")) as pool:
        _print_good(pool, 1000 // parts)
        _print_bad(pool, 200 // parts)
    return 0


def _print_good(pool: ProcessPoolExecutor, trials: int) -> None:
    print(f"### Nothing is worse: sent back, at an alpha of {SETTINGS.alpha:.0%}\n")
    print("| comparison | trials | sent back | 95 % interval |\n|---|---|---|---|")
    for scenario in GOOD:
        alarms = len(_found(pool, scenario, trials))
        low, high = compute_clopper_pearson(alarms, trials, 0.95)
        rate = f"{alarms} ({alarms / trials:.1%}) | {low:.2%} to {high:.2%}"
        print(f"| {scenario.name} | {trials:,} | {rate} |", flush=True)


def _print_bad(pool: ProcessPoolExecutor, trials: int) -> None:
    print("\n### Something is worse, in shares of all requests: sent back, and after how many\n")
    print("| what is worse | trials | sent back | 95 % interval | requests until then: median |")
    print("|---|---|---|---|---|")
    for scenario in BAD:
        delays = _found(pool, scenario, trials)
        low, high = compute_clopper_pearson(len(delays), trials, 0.95)
        rate = f"{len(delays)} ({len(delays) / trials:.0%}) | {low:.0%} to {high:.0%}"
        delay = f"{np.median(delays):.0f} of {_needed(scenario)}" if delays else "–"
        print(f"| {scenario.name} | {trials} | {rate} | {delay} |", flush=True)
    print(
        f"\nOf {SPEAKERS:.0%} of the users comes all feedback, each saying it of a larger share of their own "
        f"requests; it takes {SETTLE_S:g} s on average, so that of the last requests not all is heard."
    )


def _found(pool: ProcessPoolExecutor, scenario: Scenario, trials: int) -> list[int]:
    """Return after how many requests each rejected version was rejected."""
    found = pool.map(partial(trial, scenario), range(trials), chunksize=5)
    return [delay for delay in found if delay is not None]


def _needed(scenario: Scenario) -> int:
    return SETTINGS.min_requests if scenario.kind == "canary" else SETTINGS.bake_requests


def trial(scenario: Scenario, seed: int) -> int | None:
    """Return after how many requests a version was rejected; None if it was not."""
    rng = np.random.default_rng(seed)
    needed, users = _needed(scenario), rng.random((USERS, 1 + len(CRITERIA)))
    if scenario.kind == "canary":
        dealt = rng.random(USERS) < SETTINGS.share
        # Each side gets a share of the requests as large as its share of the users.
        new = _drawn(rng, users[dealt], scenario.rates, "new", needed, 0.0)
        old = _drawn(rng, users[~dealt], USUAL, "old", int(2 * needed / SETTINGS.share), 0.0)
    else:
        old = _drawn(rng, users, USUAL, "u", needed, -needed * STEP_S)
        old = [replace(one, at=min(one.at, 0.0)) for one in old]
        others = users if scenario.same_users else rng.random(users.shape)
        new = _drawn(rng, others, scenario.rates, "u" if scenario.same_users else "n", needed, 0.0)
    done, comparison = 0, Trial(scenario.kind, "m:new", "m:old", 0.0, 0.0, 0.0, needed, SETTLE_S)
    for share in ANALYSES:
        now = new[math.ceil(share * needed) - 1].at + SETTLE_S
        ours, theirs = ([one for one in side if one.at < now] for side in (new, old))
        verdict = analyse(comparison, ours, theirs, SETTINGS, now, done)
        if verdict.state == "bad":
            return math.ceil(ANALYSES[verdict.analyses - 1] * needed)
        done = verdict.analyses
    return None


def _drawn(
    rng: np.random.Generator,
    users: NDArray[np.float64],
    rates: Sequence[float],
    prefix: str,
    count: int,
    start: float,
) -> list[RequestOutcome]:
    """Return `count` simulated outcomes in order of time, from `start`.

    Args:
        users: whether each user gives feedback, and the quantile of the user's rates among all users.
    """
    rate = np.array(rates)
    # Those who speak say it all, the rest nothing: of all requests it is the rate again.
    rate[FEEDBACK:] /= SPEAKERS
    usual = np.where(rate > 0, beta.ppf(users[:, 1:], HABIT * rate, HABIT * (1 - rate)), 0.0)
    usual[users[:, 0] >= SPEAKERS, FEEDBACK:] = 0.0
    at = start + np.cumsum(rng.exponential(STEP_S * USERS / len(users), size=count))
    user = rng.integers(len(users), size=count)
    hit = rng.random((count, len(CRITERIA))) < usual[user]
    late = rng.exponential(SETTLE_S, size=(count, 2))
    return [
        RequestOutcome(
            at=float(at[n]),
            assignment_key=f"{prefix}{user[n]}",
            failed=bool(hit[n, 0]),
            valid=None if hit[n, 0] else not hit[n, 1],
            thumb_down_at=float(at[n] + late[n, 0]) if hit[n, 2] and not hit[n, 0] else None,
            corrected_at=float(at[n] + late[n, 1]) if hit[n, 3] and not hit[n, 0] else None,
        )
        for n in range(count)
    ]


if __name__ == "__main__":
    sys.exit(main())
