"""How often the canary and the probation send a good version back, and how soon they find a bad one.

Outcomes are drawn: users with habits of their own ask several times each, half of them ever give feedback,
and it comes late. Verdicts are polled in time, at all looks. Parameters are the shipped ones.

Run: `python -m benchmarks.canary` or `python -m benchmarks.canary --quick`
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

import numpy as np

from benchmarks.machine import machine
from flows.canary import LOOKS, Kind, Outcome, judge_canary
from stages.common.params import load_params
from stages.common.statistics import clopper_pearson

USERS = 125
STEP_S = 10.0  # between two requests, on average
SPEAKERS = 0.5  # share of the users who ever give feedback
HABIT = 8.0  # a user's rate is drawn from a beta distribution of this precision
CRITERIA = ("failed", "invalid", "thumb_down", "corrected")
USUAL = (0.0, 0.03, 0.05, 0.10)  # shares of the requests, in the order of CRITERIA
PROCESSES = 2


@dataclass(frozen=True, slots=True)
class Scenario:
    """One kind of comparison, and what the judged version's shares are."""

    name: str
    kind: Kind
    rates: tuple[float, ...] = USUAL
    same_users: bool = False
    usual: tuple[float, ...] = USUAL


GOOD = (
    Scenario("trial", "canary"),
    Scenario("probation, new users", "probation"),
    Scenario("probation, the same users before and after", "probation", same_users=True),
)
WORSE = {
    "failures 0 → 5 %": (0.05, 0.03, 0.05, 0.10),
    "invalid answers 3 → 13 %": (0.0, 0.13, 0.05, 0.10),
    "corrections 10 → 25 %": (0.0, 0.03, 0.05, 0.25),
    "thumbs down 5 → 20 %": (0.0, 0.03, 0.20, 0.10),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the trials")
    parts = 10 if parser.parse_args(arguments).quick else 1
    _say(f"{machine()}\n")
    bad = [Scenario(f"trial: {name}", "canary", rates) for name, rates in WORSE.items()]
    bad += [Scenario(f"probation: {name}", "probation", rates) for name, rates in WORSE.items()]
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
        _say("| nothing is worse | trials | sent back | 95 % interval | alpha |\n|---|---|---|---|---|")
        alpha = load_params().flows.retrain.canary.alpha
        for scenario in GOOD:
            found = list(pool.map(partial(trial, scenario), range(1000 // parts), chunksize=5))
            alarms = sum(one is not None for one in found)
            low, high = clopper_pearson(alarms, len(found), 0.95)
            row = f"{alarms / len(found):.1%} | {low:.1%} to {high:.1%} | {alpha:.0%}"
            _say(f"| {scenario.name} | {len(found)} | {row} |")
        _say("\n| what is worse | trials | found | median requests until found |\n|---|---|---|---|")
        for scenario in bad:
            found = list(pool.map(partial(trial, scenario), range(200 // parts), chunksize=5))
            delays = [one for one in found if one is not None]
            delay = f"{np.median(delays):.0f}" if delays else "none"
            _say(f"| {scenario.name} | {len(found)} | {len(delays) / len(found):.0%} | {delay} |")
    return 0


def trial(scenario: Scenario, seed: int) -> int | None:
    """Return after how many requests a version was sent back; None if it was not."""
    params = load_params()
    settings = params.flows.retrain.canary
    settle_s = params.monitoring.window.settle_s
    rng = np.random.default_rng(seed)
    on_trial = scenario.kind == "canary"
    needed = settings.min_requests if on_trial else settings.probation_requests
    # Nothing is decided by silence here: that is a setting, and no statistic.
    settings = settings.model_copy(update={"max_minutes": 1e9})
    if on_trial:
        count = needed / settings.share
        dealt = rng.random(USERS) < settings.share
        # As many users as are dealt to a side, and so a share of the requests each.
        ours, theirs = max(1, int(dealt.sum())), max(1, int((~dealt).sum()))
        pace_s = STEP_S * USERS
        new = _drawn(rng, ours, needed, 0.0, pace_s / ours, scenario.rates, settle_s, "new")
        old = _drawn(rng, theirs, 2 * int(count), 0.0, pace_s / theirs, scenario.usual, settle_s, "old")
    else:
        state = rng.integers(2**32)
        dealer = np.random.default_rng(state)
        start = -needed * STEP_S
        old = _drawn(rng, USERS, needed, start, STEP_S, scenario.usual, settle_s, "u", dealer)
        again = np.random.default_rng(state) if scenario.same_users else rng
        side = "u" if scenario.same_users else "n"
        new = _drawn(rng, USERS, needed, 0.0, STEP_S, scenario.rates, settle_s, side, again)
        old = [replace(one, at=min(one.at, 0.0)) for one in old]
    looks = 0
    for share in LOOKS:
        now = new[math.ceil(share * needed) - 1].at + settle_s
        verdict = judge_canary(
            scenario.kind,
            "m:new",
            "m:old",
            [one for one in new if one.at < now],
            [one for one in old if one.at < now],
            settings,
            needed=needed,
            since=0.0,
            now=now,
            settle_s=settle_s,
            looks=looks,
        )
        if verdict.state == "bad":
            return math.ceil(LOOKS[verdict.looks - 1] * needed)
        looks = verdict.looks
    return None


def _drawn(
    rng: np.random.Generator,
    users: int,
    count: int,
    start: float,
    step_s: float,
    rates: Sequence[float],
    late_s: float,
    prefix: str,
    habits: np.random.Generator | None = None,
) -> list[Outcome]:
    """Return `count` outcomes in the order of time; `habits` draws who the users are."""
    habits = habits or rng
    usual = np.zeros((users, len(CRITERIA)))
    for place, rate in enumerate(rates):
        if rate:
            usual[:, place] = habits.beta(HABIT * rate, HABIT * (1 - rate), size=users)
    # Those who speak say it all, the rest nothing: of all requests it is SPEAKERS times the rate.
    usual[:, 2:] *= (habits.random(users) < SPEAKERS)[:, None]
    at = start + np.cumsum(rng.exponential(step_s, size=count))
    asker = rng.integers(users, size=count)
    hit = rng.random((count, len(CRITERIA))) < usual[asker]
    late = rng.exponential(late_s, size=(count, 2))
    return [
        Outcome(
            at=float(at[n]),
            asker=f"{prefix}{asker[n]}",
            failed=bool(hit[n, 0]),
            valid=None if hit[n, 0] else not hit[n, 1],
            thumb_down_at=float(at[n] + late[n, 0]) if hit[n, 2] and not hit[n, 0] else None,
            corrected_at=float(at[n] + late[n, 1]) if hit[n, 3] and not hit[n, 0] else None,
        )
        for n in range(count)
    ]


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
