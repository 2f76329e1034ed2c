"""False alarms, detected shifts with their delay, and cost of the drift test, next to Evidently's.

Traffic is simulated (`benchmarks.drift_traffic`): autocorrelated sessions, a reference of the length in
params.yaml. Each check has its own simulated service, so that checks are independent. Evidently's
`DataDriftPreset` with its defaults gets the same rows, all columns but the vectors. Parameters are the
shipped ones.

Run: `python -m benchmarks.drift` (a quarter of an hour on two cores) or `python -m benchmarks.drift --quick`
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.drift_traffic import NONE, SHIFTS, Shift, World, columns, with_rhythm
from benchmarks.machine import machine
from monitoring.drift.baseline import Baseline, prepare_baseline
from monitoring.drift.compare import compare_window, has_drifted
from monitoring.drift.session_sums import sum_sessions
from stages.common.machine.memory import MIB, read_peak_memory
from stages.common.params.loading import load_params
from stages.common.statistics.intervals import compute_clopper_pearson

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

REFERENCE_ROWS = load_params().monitoring.reference.rows
TWO_DAYS = 15_000  # rows, at a session of five a minute
WINDOW = 500
LATER_WINDOWS = 4  # after the one in which a shift starts; what is not found by then counts as not found


@dataclass(frozen=True, slots=True)
class Scenario:
    """Several checks of one kind; Evidently gets the first `peers` of them."""

    name: str
    rows: int
    checks: int
    peers: int
    shift: Shift = NONE
    usual: Shift = NONE
    calibrated: bool = True
    users_as_sessions: bool = False
    vectors: bool = True
    reference_rows: int = REFERENCE_ROWS


@dataclass(frozen=True, slots=True)
class Peer:
    """Evidently's result: any column drifted, or half of them (its default for the data set)."""

    any_column: bool
    half: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """One check, or one shift: `delay` in rows from its start to the end of the window that showed it."""

    alarmed: bool
    peer: Peer | None
    delay: int | None = None


def main(words: Sequence[str] | None = None) -> int:
    """Measure, and print tables in Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drift", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the checks")
    parser.add_argument("--cost", type=int, metavar="ROWS", help=argparse.SUPPRESS)
    parser.add_argument("--no-vectors", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.cost:
        _cost(options.cost, vectors=not options.no_vectors)
        return 0
    # Before NumPy starts in the children: two processes with two threads each would only wait.
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
    began = time.perf_counter()
    share = 0.05 if options.quick else 1.0
    cores = os.cpu_count() or 1
    print(f"```\n{machine()}\n```\n")
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        _print_quiet(pool, share)
        _print_shifts(pool, share)
    _print_cost((10_000, 100_000) if options.quick else (10_000, 100_000, 1_000_000))
    print(f"\nIn all {time.perf_counter() - began:,.0f} s on {cores} cores.")
    return 0


def _quiet_scenarios(share: float) -> list[Scenario]:
    def some(count: int) -> int:
        return max(4, round(count * share))

    rhythm = with_rhythm(NONE, 0.5)
    return [
        Scenario("windows of 100", 100, some(1000), some(30)),
        Scenario("windows of 500", 500, some(1000), some(30)),
        Scenario("windows of 5,000", 5000, some(1000), some(20)),
        Scenario("no embeddings", 500, some(200), 0, vectors=False),
        Scenario("users name no session", 500, some(200), 0, users_as_sessions=True),
        Scenario("topics swing over the day", 500, some(200), 0, shift=rhythm, usual=rhythm),
        Scenario("same, not calibrated", 500, some(200), 0, shift=rhythm, usual=rhythm, calibrated=False),
        # 4,000 rows are thirteen hours of this traffic: they know nothing of the other half of the day.
        Scenario("same, a reference of two days", 500, some(200), 0, rhythm, rhythm, reference_rows=TWO_DAYS),
    ]


def _print_quiet(pool: ProcessPoolExecutor, share: float) -> None:
    print("### No drift: share of checks that raise an alarm\n")
    print("| traffic | checks | alarms | 95 % interval | Evidently: any column | Evidently: half of them |")
    print("|---|---|---|---|---|---|")
    for scenario in _quiet_scenarios(share):
        outcomes = _run(pool, _quiet_check, scenario, first_seed=1_000)
        print(f"| {scenario.name} | {len(outcomes):,} | {_rate(outcomes)} | {_peers(outcomes)} |", flush=True)


def _print_shifts(pool: ProcessPoolExecutor, share: float) -> None:
    checks, peers = max(4, round(200 * share)), max(2, round(10 * share))
    print(f"\n### Shifts: found in the first full window of {WINDOW}\n")
    print("| shift | trials | found | 95 % interval | delay in rows: median, 90 % |", end="")
    print(" Evidently: any column | Evidently: half of them |")
    print("|---|---|---|---|---|---|---|")
    for name, shift in SHIFTS.items():
        scenario = Scenario(name, WINDOW, checks, peers, shift=shift)
        outcomes = _run(pool, _shift_check, scenario, first_seed=500_000)
        never = LATER_WINDOWS * WINDOW + WINDOW
        delays = [never if one.delay is None else one.delay for one in outcomes]
        delay = f"{np.median(delays):,.0f}, {np.quantile(delays, 0.9):,.0f}"
        print(f"| {name} | {len(outcomes)} | {_rate(outcomes)} | {delay} | {_peers(outcomes)} |", flush=True)
    print("\nA shift starts anywhere in a window; no delay is shorter than the rest of that window.")


def _rate(outcomes: Sequence[Outcome]) -> str:
    alarms = sum(one.alarmed for one in outcomes)
    low, high = compute_clopper_pearson(alarms, len(outcomes), 0.95)
    return f"{alarms} ({alarms / len(outcomes):.1%}) | {low:.2%} to {high:.2%}"


def _peers(outcomes: Sequence[Outcome]) -> str:
    peers = [one.peer for one in outcomes if one.peer]
    if not peers:
        return "– | –"
    return " | ".join(f"{hits} of {len(peers)}" for hits in map(sum, zip(*map(_hits, peers), strict=True)))


def _hits(peer: Peer) -> tuple[bool, bool]:
    return peer.any_column, peer.half


def _run(
    pool: ProcessPoolExecutor,
    one: Callable[[Scenario, int, bool], Outcome],
    scenario: Scenario,
    first_seed: int,
) -> list[Outcome]:
    seeds = range(first_seed, first_seed + scenario.checks)
    # Every second one for Evidently: its import is paid once in each process.
    peers = [place < scenario.peers for place in range(scenario.checks)]
    return list(
        pool.map(partial(one, scenario), seeds, peers, chunksize=max(1, min(10, scenario.checks // 8)))
    )


def _baseline(world: World, scenario: Scenario) -> tuple[Baseline, list[pa.Table]]:
    reference = list(world.tables(scenario.reference_rows, scenario.usual))
    return _prepared(reference, scenario), reference


def _prepared(reference: list[pa.Table], scenario: Scenario) -> Baseline:
    monitoring = load_params().monitoring
    return prepare_baseline(
        lambda: reference, columns(scenario.vectors), monitoring.drift, monitoring.features.max_categories
    )


def _alarms(baseline: Baseline, window: list[pa.Table], calibrated: bool) -> bool:
    settings = load_params().monitoring.drift
    if not calibrated:
        settings = settings.model_copy(update={"calibration_windows": 0})
    return has_drifted(compare_window(baseline, sum_sessions(window, baseline.binning), settings))


def _quiet_check(scenario: Scenario, seed: int, with_peer: bool) -> Outcome:
    world = World(seed, scenario.vectors, scenario.users_as_sessions)
    baseline, reference = _baseline(world, scenario)
    window = list(world.tables(scenario.rows, scenario.shift))
    peer = evidently(reference, window) if with_peer else None
    return Outcome(_alarms(baseline, window, scenario.calibrated), peer)


def _shift_check(scenario: Scenario, seed: int, with_peer: bool) -> Outcome:
    world = World(seed)
    baseline, reference = _baseline(world, scenario)
    before = int(np.random.default_rng(seed).integers(1, scenario.rows))
    first = [*world.tables(before), *world.tables(scenario.rows - before, scenario.shift)]
    full = list(world.tables(scenario.rows, scenario.shift))
    peer = evidently(reference, full) if with_peer else None
    found = _alarms(baseline, full, scenario.calibrated)
    since = scenario.rows - before
    delay: int | None = None
    if _alarms(baseline, first, scenario.calibrated):
        delay = since
    elif found:
        delay = since + scenario.rows
    else:
        for later in range(2, LATER_WINDOWS + 1):
            if _alarms(baseline, list(world.tables(scenario.rows, scenario.shift)), scenario.calibrated):
                delay = since + later * scenario.rows
                break
    return Outcome(found, peer, delay)


def evidently(reference: list[pa.Table], window: list[pa.Table]) -> Peer:
    """Return the result of Evidently's default drift preset on the same rows, without vectors and service."""
    os.environ["DO_NOT_TRACK"] = "1"
    from evidently import Report
    from evidently.presets import DataDriftPreset

    current, usual = _frame(window), _frame(reference)
    # A column that is empty on one side is an error there.
    there = [
        name for name in usual.columns if usual[name].notna().sum() > 1 and current[name].notna().sum() > 1
    ]
    snapshot = Report([DataDriftPreset()]).run(current[there], usual[there])
    counted = next(
        metric["value"]
        for metric in snapshot.dict()["metrics"]
        if isinstance(metric["value"], dict) and "share" in metric["value"]
    )
    return Peer(counted["count"] >= 1, counted["share"] >= 0.5)


def _frame(tables: list[pa.Table]) -> pd.DataFrame:
    import pyarrow as pa

    names = [column.name for column in columns(vectors=False) if column.drift_type != "service"]
    frame: pd.DataFrame = pa.concat_tables(tables).select(names).to_pandas()
    return frame


def _print_cost(sizes: Sequence[int]) -> None:
    print("\n### Cost of a check, from feature tables to the verdict\n")
    print("| rows | vectors | seconds | peak memory, MiB |")
    print("|---|---|---|---|")
    for rows in sizes:
        for vectors in (False, True):
            child = subprocess.run(
                [
                    *(sys.executable, "-m", "benchmarks.drift", "--cost", str(rows)),
                    *([] if vectors else ["--no-vectors"]),
                ],
                capture_output=True,
                text=True,
                check=True,
            )
            seconds, mib = child.stdout.split()
            print(f"| {rows:,} | {'yes' if vectors else 'no'} | {seconds} | {mib} |", flush=True)
    print("\nDrawing the rows is not counted in the seconds, and is counted in the memory.")


def _cost(rows: int, vectors: bool) -> None:
    """Check one window in this process; print seconds and peak memory in MiB."""
    scenario = Scenario("", rows, 1, 0, vectors=vectors)
    world = World(1, vectors)
    baseline, _ = _baseline(world, scenario)
    drawing = 0.0

    def drawn() -> Iterator[pa.Table]:
        nonlocal drawing
        tables = world.tables(rows, SHIFTS["20 % new intents"])
        while True:
            began = time.perf_counter()
            table = next(tables, None)
            drawing += time.perf_counter() - began
            if table is None:
                return
            yield table

    began = time.perf_counter()
    compare_window(baseline, sum_sessions(drawn(), baseline.binning), load_params().monitoring.drift)
    seconds = time.perf_counter() - began - drawing
    print(f"{seconds:.1f} {read_peak_memory() / MIB:.0f}")


if __name__ == "__main__":
    sys.exit(main())
