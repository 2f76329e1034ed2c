"""Robustness trials of the service: soak, overload, kill -9, version switch under load."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from benchmarks.serving_children import from_row
from benchmarks.serving_load import Answer, at_once, chat_request, load
from benchmarks.serving_peers import (
    Child,
    Questions,
    Served,
    Workspace,
    about,
    running,
    service,
)
from benchmarks.serving_report import Plan, Report, by_status, ms, settled
from services.versions.aliases import ALIASES, Aliases, write_aliases
from stages.common.tag import Tag

SOAK_CLIENTS, KILL_CLIENTS, SWITCH_CLIENTS = 64, 16, 16
OVERLOAD = 400


def acknowledged(answers: Iterable[Answer]) -> set[str]:
    """Return the ids of answers whose last byte arrived."""
    return {answer.request_id or "" for answer in answers if answer.ok}


def stored_ids(place: Workspace, start: float, end: float) -> set[str]:
    """Return the ids of answered requests in the event store, received in [start, end) (unix s)."""
    from services.events import read_exchanges

    return {
        row["request_id"]
        for batch in read_exchanges(place.events_url, start, end)
        for row in batch.select(["request_id", "status"]).to_pylist()
        if row["status"] == 200
    }


async def watch(child: Child, samples: list[tuple[float, float]]) -> None:
    """Record the resident memory of a process tree every second, until cancelled; seconds from now, MiB."""
    started = time.monotonic()
    while True:
        samples.append((time.monotonic() - started, child.resident_mib()))
        await asyncio.sleep(1.0)


async def soak(place: Workspace, questions: Questions, plan: Plan) -> Report:
    """Run 64 clients for a while; record the memory, and compare the stored events with the answers."""
    report, samples = Report(), list[tuple[float, float]]()
    async with running(place, questions) as ours:
        began = time.time()
        watching = asyncio.create_task(watch(ours.child, samples))
        run = await load(ours.port, ours.requests, SOAK_CLIENTS, from_row(0), plan.soak_s)
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        stored = stored_ids(place, began, time.time())
    answered = acknowledged(run.answers)
    tenth = next((mib for second, mib in samples if second >= 10), samples[-1][1])
    peak = max(mib for second, mib in samples if second >= 10 or second == samples[-1][0])
    totals = [answer.ended - answer.sent for answer in settled(run)]
    server_errors = sum(answer.status >= 500 or not answer.status for answer in run.answers)
    report.figures = {
        "status": by_status(run.answers),
        "answered": len(answered),
        "stored": len(stored),
        "not_stored": len(answered - stored),
        "stored_only": len(stored - answered),
        "resident_mib": {"tenth_second": tenth, "peak": peak},
        "samples": samples,
    }
    report.table(
        (f"{SOAK_CLIENTS} clients, {plan.soak_s:g} s", "reached", "target"),
        [
            ("answers by status", _counts(report.figures["status"]), "–"),
            ("5xx, or no answer", server_errors, 0),
            ("answered, not in the event store", len(answered - stored), 0),
            ("in the event store, not answered", len(stored - answered), 0),
            ("answer p50 / p95 / p99, ms", ms(totals, 0.5, 0.95, 0.99), "–"),
            ("resident memory, 10th second, MiB", f"{tenth:,.0f}", "–"),
            ("its peak afterwards, MiB", f"{peak:,.0f} (× {peak / tenth:.2f})", "< × 1.2"),
        ],
    )
    return report


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items())


async def overload(place: Workspace, questions: Questions, plan: Plan) -> Report:
    """Send 400 requests at once; measure how fast, and with which status, the surplus is refused."""
    report = Report()
    async with running(place, questions) as ours:
        requests = [ours.requests[number % len(ours.requests)] for number in range(OVERLOAD)]
        await at_once(ours.port, requests[:8])
        began = time.time()
        answers = await at_once(ours.port, requests)
        stored = stored_ids(place, began, time.time())
        after = await load(ours.port, ours.requests, 1, from_row(0), 0.0, 1)
    refused = [answer for answer in answers if answer.status == 429]
    accepted = [answer for answer in answers if answer.status == 200]
    times = [answer.ended - answer.sent for answer in refused]
    shaped = sum(_is_openai_error(answer.error) for answer in refused)
    lost = acknowledged(answers) - stored
    report.figures = {"status": by_status(answers), "refused_s": sorted(times), "lost": len(lost)}
    report.table(
        (f"{OVERLOAD} requests at once", "reached", "target"),
        [
            ("answers by status", _counts(by_status(answers)), "–"),
            ("time to a 429, p50 / p99 / longest, ms", ms(times, 0.5, 0.99, 1.0), "≤ 50"),
            (
                "429 with Retry-After",
                f"{sum(a.retry_after is not None for a in refused)} of {len(refused)}",
                "all",
            ),
            ("429 in OpenAI's shape", f"{shaped} of {len(refused)}", "all"),
            ("accepted and wholly answered", f"{sum(a.ok for a in accepted)} of {len(accepted)}", "all"),
            ("answered, not in the event store", len(lost), 0),
            ("a request afterwards", _counts(by_status(after.answers)), 200),
        ],
    )
    return report


def _is_openai_error(error: Any) -> bool:
    return isinstance(error, dict) and {"message", "type", "param", "code"} <= error.keys()


async def kill(place: Workspace, questions: Questions, plan: Plan) -> Report:
    """Kill the service with SIGKILL under load, restart it, and look for every acknowledged answer."""
    report, stop = Report(), asyncio.Event()
    ours = await service(place, questions)
    try:
        # Half of the requests stream, half get their answer in one piece.
        bodies = [body | {"stream": number % 2 == 0} for number, body in enumerate(questions.bodies())]
        requests = [chat_request(ours.port, body) for body in bodies]
        began = time.time()
        loading = asyncio.create_task(load(ours.port, requests, KILL_CLIENTS, from_row(0), 60.0, stop=stop))
        await asyncio.sleep(max(6.0, plan.seconds))
        killed = ours.child.kill()
        stop.set()
        run = await loading
    finally:
        await asyncio.to_thread(ours.child.end)
    again_at = time.monotonic()
    again = await service(place, questions)
    try:
        ready_s = time.monotonic() - again_at
        after = await load(again.port, again.requests, 1, from_row(0), 0.0, 1)
        stored = stored_ids(place, began, time.time())
    finally:
        await asyncio.to_thread(again.child.end)
    answered = acknowledged(run.answers)
    unanswered = stored - answered - acknowledged(after.answers)
    report.figures = {
        "status": by_status(run.answers),
        "acknowledged": len(answered),
        "lost": len(answered - stored),
        "stored_only": len(unanswered),
        "ready_s": ready_s,
    }
    report.table(
        (f"kill -9 under {KILL_CLIENTS} clients", "reached", "target"),
        [
            ("processes killed", killed, "–"),
            ("answers by status", _counts(by_status(run.answers)), "–"),
            ("acknowledged, not in the event store", len(answered - stored), 0),
            ("in the event store, last byte not arrived", len(unanswered), "–"),
            ("start to /readyz 200, s", f"{ready_s:.1f}", "≤ 20"),
            ("a request afterwards", _counts(by_status(after.answers)), 200),
        ],
    )
    return report


async def switch(place: Workspace, questions: Questions, plan: Plan) -> Report:
    """Make another version the champion under load, then switch back."""
    report, stop = Report(), asyncio.Event()
    printed = place.python("benchmarks.serving_children", "second-version", "--work", str(place.folder))
    first, second = json.loads(printed.splitlines()[-1])
    path = place.folder / ALIASES  # moved here, since these versions have not passed the gate
    write_aliases(path, Aliases(first))
    moves: list[tuple[str, str, float]] = []
    async with running(place, questions) as ours:
        loading = asyncio.create_task(
            load(ours.port, ours.requests, SWITCH_CLIENTS, from_row(0), 300.0, stop=stop)
        )
        for name, new in (
            ("champion, to be loaded", second),
            ("rollback", first),
            ("champion, in memory", second),
        ):
            await asyncio.sleep(3.0)
            write_aliases(path, Aliases(new))
            moves.append((name, _version(new), await _wait_for(ours, _version(new))))
        await asyncio.sleep(3.0)
        stop.set()
        run = await loading
    failed = [answer for answer in run.answers if not answer.ok]
    rows: list[Sequence[object]] = [
        ("answers by status", _counts(by_status(run.answers)), "–"),
        ("failed", len(failed), 0),
    ]
    ends = [*(begun for _, _, begun in moves[1:]), run.stopped]
    for (name, new, begun), until in zip(moves, ends, strict=True):
        after = [a for a in run.answers if a.ok and begun <= a.ended < until]
        news = [a.first - begun for a in after if a.version == new and a.first is not None]
        olds = [a.ended - begun for a in after if a.version != new]
        rows += [
            (
                f"{name}: to the first text by the new version, s",
                f"{min(news, default=float('nan')):.1f}",
                "< 5",
            ),
            (f"{name}: to the end of the last answer by the old, s", f"{max(olds, default=0.0):.1f}", "< 5"),
        ]
        report.figures[name] = {"first_new_s": min(news, default=None)}
        report.figures[name]["last_old_s"] = max(olds, default=None)
    report.figures["failed"] = len(failed)
    report.table((f"switch under {SWITCH_CLIENTS} clients", "reached", "target"), rows)
    return report


def _version(tag: str) -> str:
    return Tag.parse(tag).version


async def _wait_for(ours: Served, new: str, within_s: float = 90.0) -> float:
    """Wait until the new version answers; return when the wait began."""
    begun = time.monotonic()
    while time.monotonic() - begun < within_s and (await about(ours.port)).get("version") != new:
        await asyncio.sleep(0.2)
    return begun
