"""The service against its peers: speed, constrained answers, a soak, overload, kill -9, a switch of versions.

    python -m benchmarks.serving [--rounds 3] [--seconds 8] [--soak-s 120] [--quick]
        [--only throughput,constrained,soak,overload,kill,switch] [--out serving.json]
        [--contenders transformers,bare,openvino,llama.cpp,ctranslate2,perennial]

Needs the pipeline's output up to `export` (`dvc repro export evaluate`). The service runs with the parameters
of this checkout, in a folder of its own under `.perennial`, with its own events and model store; nothing that
is served here is touched. Every server is a process of its own on 127.0.0.1. Peers that are not installed
(xllamacpp, ctranslate2) are left out and named. Prints Markdown; `docs/benchmarks.md` keeps the results.

Other work on the machine hurts some more than others: threads of llama.cpp that wait for each other on
cores that others use are fifty times slower. Run it alone, or with a higher priority (`nice -n -10`), which
all that it starts inherits.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine
from benchmarks.serving_children import from_row
from benchmarks.serving_load import Answer, Run, at_once, chat_request, get, load
from benchmarks.serving_peers import (
    Child,
    Contender,
    NotStarted,
    Questions,
    Served,
    Workspace,
    bare,
    installed,
    read_questions,
    served,
    service,
    workspace,
)
from stages.common.artifacts import artifacts
from stages.common.metrics import read_json_answer
from stages.common.models import load_tokenizer

CLIENTS = (1, 8, 32)
CONTENDERS = ("transformers", "bare", "openvino", "llama.cpp", "ctranslate2", "perennial")
TRANSFORMERS, BARE, OURS = "transformers", "bare engine", "perennial"
SPEED_ASKED = {1: 8.0, 8: 20.0, 32: 20.0}  # times transformers
SOAK_CLIENTS, KILL_CLIENTS, SWITCH_CLIENTS, CONSTRAINED_CLIENTS = 64, 16, 16, 8
OVERLOAD = 400
# A schema that the model was never taught, and room for an answer that it was never taught either.
OTHER_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
OTHER_MAX_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how often.

    Attributes:
        seconds: of a turn, at least.
        each: requests of every client in a turn, at least.
        contenders: who takes part in the throughput.
    """

    rounds: int
    seconds: float
    soak_s: float
    each: int = 2
    contenders: tuple[str, ...] = CONTENDERS


@dataclass(slots=True)
class Report:
    """What a section found: text for `docs/benchmarks.md`, and the figures."""

    lines: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def table(self, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Add a table; all columns but the first are aligned to the right."""
        self.lines.append("| " + " | ".join(head) + " |")
        self.lines.append("|---|" + "---:|" * (len(head) - 1))
        self.lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
        self.lines.append("")

    def say(self, text: str) -> None:
        """Add a paragraph."""
        self.lines += [text, ""]


def note(text: str) -> None:
    """Say how far it is."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def quantile(values: Sequence[float], share: float) -> float:
    """Return a quantile; NaN of nothing."""
    return float(np.quantile(values, share)) if values else float("nan")


def ms(values: Sequence[float], *shares: float) -> str:
    """Return quantiles of seconds as ms."""
    return " / ".join(f"{1000 * quantile(values, share):,.0f}" for share in shares) if values else "–"


# Throughput


@dataclass(frozen=True, slots=True)
class Judge:
    """Counts the tokens of answers, with one tokenizer for everybody, and says which are right."""

    tokenizer: Any
    references: list[str]

    def tokens(self, answers: Sequence[Answer]) -> list[int]:
        """Return how many tokens each answer has."""
        if not answers:
            return []
        ids = self.tokenizer([answer.text for answer in answers], add_special_tokens=False)["input_ids"]
        return [len(one) for one in ids]

    def right(self, answer: Answer) -> bool:
        """Return whether an answer is what the row says, as a JSON value where it is one."""
        reference = self.references[answer.row % len(self.references)]
        wanted, found = read_json_answer(reference), read_json_answer(answer.text)
        if wanted is None or found is None:
            return answer.text.strip() == reference.strip()
        return found.canonical == wanted.canonical

    def tokens_per_s(self, run: Run[Answer]) -> float:
        """Return the tokens that were written while all clients asked.

        Of an answer that was not ready when they stopped the part counts that was written by then.
        """
        written = 0.0
        for answer, count in zip(run.answers, self.tokens(run.answers), strict=True):
            begun = answer.sent if answer.first is None else answer.first
            length = answer.ended - begun
            share = 1.0 if answer.ended <= run.stopped else max(0.0, run.stopped - begun) / max(length, 1e-9)
            written += count * min(share, 1.0)
        return written / (run.stopped - run.started)


def settled(run: Run[Answer]) -> list[Answer]:
    """Return a turn's answers without each client's first, which all came at the same moment."""
    by_time = sorted(run.answers, key=lambda answer: answer.sent)
    good = [answer for answer in by_time[run.clients :] if answer.ok]
    return good or [answer for answer in by_time if answer.ok]


def speeds(judge: Judge, runs: Sequence[Run[Answer]], others: Sequence[Run[Answer]] = ()) -> list[float]:
    """Return tokens/s of every round, or their ratios to another's in the same round."""
    own = [judge.tokens_per_s(run) for run in runs]
    if not others:
        return own
    return [
        mine / theirs for mine, theirs in zip(own, map(judge.tokens_per_s, others), strict=False) if theirs
    ]


async def throughput(place: Workspace, questions: Questions, plan: Plan) -> Report:
    """Measure tokens/s and waiting times of everybody, in turns."""
    report = Report()
    judge = Judge(load_tokenizer(artifacts("fetch_base")), [row.answer for row in questions.rows])
    async with contenders(place, questions, plan.contenders, report) as them:
        runs = await rounds(them, plan, report)
    for clients in CLIENTS:
        _throughput_table(report, judge, clients, {name: runs[name, clients] for name in them})
    _throughput_targets(report, judge, runs)
    return report


async def rounds(
    them: Mapping[str, Contender], plan: Plan, report: Report
) -> dict[tuple[str, int], list[Run[Answer]]]:
    """Let everybody answer in turn, round after round, the same rows."""
    runs: dict[tuple[str, int], list[Run[Answer]]] = {(name, c): [] for name in them for c in CLIENTS}
    for name, contender in them.items():
        note(f"warming up {name}")
        await contender.turn(CLIENTS[-1] if contender.name != TRANSFORMERS else 1, 0, 0.5, 2)
    for number in range(plan.rounds):
        for clients in CLIENTS:
            for name, contender in them.items():
                first = 101 * (number * len(CLIENTS) + CLIENTS.index(clients))
                run = await contender.turn(clients, first, plan.seconds, plan.each * clients)
                runs[name, clients].append(run)
                done = sum(answer.ok for answer in run.answers)
                note(
                    f"round {number + 1}, {clients} at once, {name}: {done} of {len(run.answers)} answers"
                    f" in {run.stopped - run.started:.1f} s"
                )
                if failed := [answer for answer in run.answers if not answer.ok]:
                    report.figures.setdefault("failures", []).append(f"{name}, {clients}: {failed[0]}")
                    note(f"the first that failed: {failed[0]}")
    return runs


@asynccontextmanager
async def contenders(
    place: Workspace, questions: Questions, wanted: Sequence[str], report: Report
) -> AsyncIterator[dict[str, Contender]]:
    """Start everybody who is installed, and end them afterwards; yields them by name."""
    them: dict[str, Contender] = {}
    async with AsyncExitStack() as stack:

        async def add(starting: Awaitable[Contender], name: str) -> None:
            note(f"starting {name}")
            try:
                contender = await starting
            except NotStarted as error:
                note(str(error))
                report.say(f"*{name}* did not start: {str(error).splitlines()[0]}.")
                return
            stack.push_async_callback(asyncio.to_thread, contender.child.end)
            them[contender.name] = contender

        async def without_server(name: str, *arguments: object) -> Contender:
            contender, about = await bare(place, name, *map(str, arguments))
            engines.append(about["engine"])
            return contender

        engines: list[str] = []
        if "transformers" in wanted:
            await add(served(place, questions, TRANSFORMERS, "/health", "transformers"), TRANSFORMERS)
        if "bare" in wanted:
            await add(without_server(BARE, "engine"), BARE)
            report.say(f"Our engine on this machine: {', '.join(engines)}.")
        if "openvino" in wanted and "openvino" not in engines and installed("openvino_genai"):
            await add(without_server("openvino", "engine", "--kind", "openvino"), "openvino")
        if "llama.cpp" in wanted and _is_there(report, "xllamacpp", "llama.cpp"):
            for name, gguf in _ggufs(place):
                await add(served(place, questions, name, "/health", "llama", "--gguf", gguf), name)
        if "ctranslate2" in wanted and _is_there(report, "ctranslate2", "CTranslate2"):
            name = "ctranslate2 int8"
            await add(without_server(name, "ctranslate2", "--work", place.folder), name)
        if "perennial" in wanted:
            await add(service(place, questions), OURS)
        yield them


def _is_there(report: Report, module: str, name: str) -> bool:
    if not installed(module):
        report.say(f"*{name}* is left out: {module} is not installed.")
    return installed(module)


def _ggufs(place: Workspace) -> Iterator[tuple[str, Path]]:
    """Return the pipeline's GGUF and one of 8 bits, made for the occasion."""
    own = artifacts("export") / "model.gguf"
    if own.exists():
        yield "llama.cpp", own.resolve()
    small = place.folder / "q8_0.gguf"
    note("writing a GGUF of 8 bits")
    place.python("benchmarks.serving_children", "quantize", "--type", "q8_0", "--gguf", str(small))
    yield "llama.cpp q8_0", small


def _throughput_table(
    report: Report, judge: Judge, clients: int, runs: Mapping[str, Sequence[Run[Answer]]]
) -> None:
    rows = []
    for name, own in runs.items():
        found, kept = speeds(judge, own), [answer for run in own for answer in settled(run)]
        every = [answer for run in own for answer in run.answers]
        good = [answer for answer in every if answer.ok]
        firsts = [answer.first - answer.sent for answer in kept if answer.first is not None]
        totals = [answer.ended - answer.sent for answer in kept]
        exact = sum(map(judge.right, good)) / max(1, len(good))
        rows.append(
            (
                name,
                f"{statistics.median(found):,.0f} ({min(found):,.0f} to {max(found):,.0f})",
                *(_ratio(judge, own, runs.get(other, ())) for other in (TRANSFORMERS, BARE)),
                ms(firsts, 0.5, 0.95),
                ms(totals, 0.5, 0.95, 0.99),
                f"{exact:.3f}",
                len(good),
                len(every) - len(good),
                _cpu(own),
            )
        )
        report.figures[f"{name}, {clients}"] = {
            "tokens_per_s": found,
            "first_text_s": [quantile(firsts, share) for share in (0.5, 0.95)],
            "answer_s": [quantile(totals, share) for share in (0.5, 0.95, 0.99)],
            "exact_match": exact,
            "answers": len(good),
            "failed": len(every) - len(good),
        }
    report.say(f"**{clients} at once**")
    report.table(
        (
            *("", "tokens/s (rounds)", "× transformers", "× bare", "first text p50 / p95, ms"),
            *("answer p50 / p95 / p99, ms", "exact match", "answers", "failed", "clients' CPU, s/s"),
        ),
        rows,
    )


def _cpu(runs: Sequence[Run[Answer]]) -> str:
    share = sum(run.cpu_s for run in runs) / sum(run.stopped - run.started for run in runs)
    return "–" if math.isnan(share) else f"{share:.3f}"


def _ratio(judge: Judge, own: Sequence[Run[Answer]], others: Sequence[Run[Answer]]) -> str:
    return f"{statistics.median(speeds(judge, own, others)):.2f}" if others else "–"


def _throughput_targets(
    report: Report, judge: Judge, runs: Mapping[tuple[str, int], Sequence[Run[Answer]]]
) -> None:
    rows: list[Sequence[object]] = []
    for clients in CLIENTS:
        ours = runs.get((OURS, clients), ())
        for other, asked in ((TRANSFORMERS, SPEED_ASKED[clients]), (BARE, 0.95)):
            if ours and (others := runs.get((other, clients), ())):
                reached = statistics.median(speeds(judge, ours, others))
                rows.append(
                    (f"tokens/s against {other}, {clients} at once", f"{reached:.2f}", f"≥ {asked:g}")
                )
    if (ours := runs.get((OURS, 8), ())) and (others := runs.get((BARE, 8), ())):
        waits = [statistics.median([_first_text(run) for run in some]) for some in (ours, others)]
        rows.append(("first text against bare engine, 8 at once, p50", f"{waits[0] / waits[1]:.2f}", "≤ 1.3"))
    report.table(("", "reached", "asked"), rows)


def _first_text(run: Run[Answer]) -> float:
    return quantile([a.first - a.sent for a in settled(run) if a.first is not None], 0.5)


# Constrained answers


async def constrained(place: Workspace, questions: Questions, plan: Plan) -> Report:
    """Measure answers that are held to a schema against free ones, in turns."""
    report = Report()
    judge = Judge(load_tokenizer(artifacts("fetch_base")), [row.answer for row in questions.rows])
    async with running(place, questions) as ours:
        schema = (await about(ours.port))["answer_schema"]
        modes: dict[str, tuple[Any, dict[str, Any]]] = {"free": (schema, {})}
        if schema is not None:
            modes["the task's schema"] = (schema, held_to(schema))
        modes["another schema"] = (OTHER_SCHEMA, {**held_to(OTHER_SCHEMA), "max_tokens": OTHER_MAX_TOKENS})
        modes["any JSON object"] = ({"type": "object"}, {"response_format": {"type": "json_object"}})
        requests = {name: questions.requests(ours.port, **more) for name, (_, more) in modes.items()}
        runs: dict[str, list[Run[Answer]]] = {name: [] for name in modes}
        for number in range(plan.rounds):
            for name, own in runs.items():
                rows = from_row(101 * number)
                own.append(await load(ours.port, requests[name], CONSTRAINED_CLIENTS, rows, plan.seconds))
                note(f"round {number + 1}, {name}: {len(own[-1].answers)} answers")
    report.table(
        (
            "",
            "tokens/s",
            "× free",
            "fits its schema",
            "… if not cut",
            "cut at max_tokens",
            "exact match",
            "failed",
        ),
        [
            _constrained_row(report, judge, name, modes[name][0], own, runs["free"])
            for name, own in runs.items()
        ],
    )
    return report


def held_to(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a request that asks for an answer in a schema."""
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}


def _constrained_row(
    report: Report,
    judge: Judge,
    name: str,
    schema: Any,
    own: Sequence[Run[Answer]],
    free: Sequence[Run[Answer]],
) -> Sequence[object]:
    every = [answer for run in own for answer in run.answers]
    good = [answer for answer in every if answer.ok]
    whole = [answer for answer in good if answer.finish_reason != "length"]
    fitting = [answer for answer in good if fits(answer.text, schema)]
    ratio = statistics.median(speeds(judge, own, free))
    exact = sum(map(judge.right, good)) / max(1, len(good))
    report.figures[name] = {
        "tokens_per_s": speeds(judge, own),
        "ratio": ratio,
        "fits": len(fitting),
        "cut": len(good) - len(whole),
        "answers": len(every),
        "refusals": [answer.error for answer in every if answer.error][:3],
    }
    return (
        name,
        f"{statistics.median(speeds(judge, own)):,.0f}",
        f"{ratio:.2f}",
        f"{len(fitting)} of {len(good)}",
        f"{sum(fits(answer.text, schema) for answer in whole)} of {len(whole)}",
        len(good) - len(whole),
        f"{exact:.3f}",
        len(every) - len(good),
    )


def fits(text: str, schema: Any) -> bool:
    """Return whether a text is JSON that a schema allows; without a schema, whether it is JSON."""
    import jsonschema  # type: ignore[import-untyped]

    try:
        value = json.loads(text)
    except ValueError:
        return False
    return schema is None or bool(jsonschema.Draft202012Validator(schema).is_valid(value))


# What the service bears


@asynccontextmanager
async def running(place: Workspace, questions: Questions) -> AsyncIterator[Served]:
    """Start a service; end it afterwards. Yields it when it is ready."""
    ours = await service(place, questions)
    try:
        yield ours
    finally:
        await asyncio.to_thread(ours.child.end)


async def about(port: int) -> dict[str, Any]:
    """Return what the service says of its champion; empty while it says nothing."""
    status, body = await get(port, "/v1/models")
    found: dict[str, Any] = json.loads(body)["data"][0]["perennial"] if status == 200 else {}
    return found


def by_status(answers: Iterable[Answer]) -> dict[str, int]:
    """Count answers by status; a whole 200 is not the same as one that was cut off."""
    names = (
        "broken"
        if not answer.status
        else f"{answer.status}" + ("" if answer.ok or answer.status != 200 else " cut")
        for answer in answers
    )
    return dict(sorted(Counter(names).items()))


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
    """Note the resident memory of a tree every second, until cancelled; s from now, MiB."""
    started = time.monotonic()
    while True:
        samples.append((time.monotonic() - started, child.resident_mib()))
        await asyncio.sleep(1.0)


async def soak(place: Workspace, questions: Questions, plan: Plan) -> Report:
    """Keep 64 clients on the service for a while; watch its memory, compare its events."""
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
        (f"{SOAK_CLIENTS} clients, {plan.soak_s:g} s", "reached", "asked"),
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
    """Send 400 requests at once; see how fast and in what shape the surplus is refused."""
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
        (f"{OVERLOAD} requests at once", "reached", "asked"),
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
    """Kill the service with SIGKILL under load; start it again; look for what it had acknowledged."""
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
        (f"kill -9 under {KILL_CLIENTS} clients", "reached", "asked"),
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
    """Make another version the champion under load, and go back."""
    report, stop = Report(), asyncio.Event()
    printed = place.python("benchmarks.serving_children", "second-version", "--work", str(place.folder))
    first, second = json.loads(printed.splitlines()[-1])
    place.python("services.versions", "champion", first)
    moves: list[tuple[str, str, float, float]] = []
    async with running(place, questions) as ours:
        loading = asyncio.create_task(
            load(ours.port, ours.requests, SWITCH_CLIENTS, from_row(0), 300.0, stop=stop)
        )
        for name, command, new in (
            ("champion", ("champion", second), second),
            ("rollback", ("rollback",), first),
        ):
            await asyncio.sleep(3.0)
            moves.append((name, _version(new), *await _move(place, ours, command, _version(new))))
        await asyncio.sleep(3.0)
        stop.set()
        run = await loading
    failed = [answer for answer in run.answers if not answer.ok]
    rows: list[Sequence[object]] = [
        ("answers by status", _counts(by_status(run.answers)), "–"),
        ("failed", len(failed), 0),
    ]
    ends = [*(begun for _, _, begun, _ in moves[1:]), run.stopped]
    for (name, new, begun, command_s), until in zip(moves, ends, strict=True):
        after = [a for a in run.answers if a.ok and begun <= a.ended < until]
        news = [a.first - begun for a in after if a.version == new and a.first is not None]
        olds = [a.ended - begun for a in after if a.version != new]
        rows += [
            (f"{name}: the command itself, s", f"{command_s:.1f}", "–"),
            (
                f"{name}: to the first text by the new version, s",
                f"{min(news, default=float('nan')):.1f}",
                "< 5",
            ),
            (f"{name}: to the end of the last answer by the old, s", f"{max(olds, default=0.0):.1f}", "< 5"),
        ]
        report.figures[name] = {"command_s": command_s, "first_new_s": min(news, default=None)}
        report.figures[name]["last_old_s"] = max(olds, default=None)
    report.figures["failed"] = len(failed)
    report.table((f"switch under {SWITCH_CLIENTS} clients", "reached", "asked"), rows)
    return report


def _version(tag: str) -> str:
    return tag.partition(":")[2]


async def _move(
    place: Workspace, ours: Served, command: Sequence[str], new: str, within_s: float = 90.0
) -> tuple[float, float]:
    """Give a command and wait until the new version answers; return its start and how long it took."""
    begun = time.monotonic()
    await asyncio.to_thread(place.python, "services.versions", *command)
    command_s = time.monotonic() - begun
    while time.monotonic() - begun < within_s and (await about(ours.port)).get("version") != new:
        await asyncio.sleep(0.2)
    return begun, command_s


# All together


Section = Callable[[Workspace, Questions, Plan], Awaitable[Report]]
SECTIONS: dict[str, tuple[str, Section]] = {
    "throughput": ("Throughput and waiting times", throughput),
    "constrained": ("Answers held to a schema", constrained),
    "soak": ("Soak", soak),
    "overload": ("Overload", overload),
    "kill": ("kill -9 under load", kill),
    "switch": ("Switching versions under load", switch),
}


async def measure(names: Sequence[str], plan: Plan) -> dict[str, Any]:
    """Run sections one after the other, print each as it ends, and return all figures."""
    questions, found = read_questions(), dict[str, Any]()
    with workspace() as place:
        for name in names:
            title, section = SECTIONS[name]
            note(f"{name} …")
            try:
                report = await section(place, questions, plan)
            except NotStarted as error:
                report = Report([f"Not measured: {error}", ""])
            found[name] = report.figures
            print(f"## {title}\n")
            print("\n".join(report.lines), flush=True)
    return found


def main() -> None:
    """Measure what is asked for, and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of a turn, at least")
    parser.add_argument("--soak-s", type=float, default=120.0)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="in the throughput")
    parser.add_argument("--quick", action="store_true", help="one round of short turns, to see that it runs")
    parser.add_argument("--out", type=Path, help="also write all figures to this file, as JSON")
    arguments = parser.parse_args()
    names, who = arguments.only.split(","), tuple(arguments.contenders.split(","))
    for given, known in ((names, SECTIONS), (who, CONTENDERS)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    plan = Plan(arguments.rounds, arguments.seconds, arguments.soak_s, contenders=who)
    if arguments.quick:
        plan = Plan(1, 3.0, 15.0, 1, who)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what we started ends with us
    about_machine = machine()
    print(
        f"Machine: {about_machine['cores']} cores of {about_machine['processor']}"
        f" ({', '.join(about_machine['bf16']) or 'no bf16'}), {about_machine['memory_gib']} GiB,"
        f" {about_machine['platform']}, Python {about_machine['python']}. Date: {about_machine['date']}."
        f" Load before: {os.getloadavg()[0]:.1f}. Rounds: {plan.rounds}; turns of {plan.seconds:g} s.\n",
        flush=True,
    )
    try:
        found = asyncio.run(measure(names, plan))
    except KeyboardInterrupt:
        sys.exit("interrupted; what was started has ended")
    if arguments.out:
        text = json.dumps({"machine": about_machine, **found}, indent=2)
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
