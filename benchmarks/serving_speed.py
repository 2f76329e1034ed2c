"""Speed of all contenders, with and without a schema, measured in turns."""

from __future__ import annotations

import asyncio
import json
import math
import statistics
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from benchmarks.serving_children import from_row
from benchmarks.serving_load import Answer, Run, load
from benchmarks.serving_peers import (
    Contender,
    NotStarted,
    Questions,
    Workspace,
    about,
    bare,
    installed,
    running,
    served,
    service,
)
from benchmarks.serving_report import Judge, Plan, Report, ms, note, quantile, settled, speeds
from stages.common.artifacts import artifacts
from stages.common.model.loading import load_tokenizer

CLIENTS = (1, 8, 32)
TRANSFORMERS, BARE, OURS = "transformers", "bare engine", "perennial"
SPEED_ASKED = {1: 8.0, 8: 20.0, 32: 20.0}  # times transformers
CONSTRAINED_CLIENTS = 8
# A schema that the model was never taught, and room for an answer that it was never taught either.
OTHER_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
OTHER_MAX_TOKENS = 128


async def throughput(place: Workspace, questions: Questions, plan: Plan) -> Report:
    """Measure tokens/s and latencies of all contenders, in turns."""
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
    """Let all contenders answer the same rows in turn, round after round."""
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
    """Start all installed contenders, and stop them afterwards; yield them by name."""
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
        report.say(f"*{name}* is skipped: {module} is not installed.")
    return installed(module)


def _ggufs(place: Workspace) -> Iterator[tuple[str, Path]]:
    """Return the pipeline's GGUF and an 8-bit one, made for this benchmark."""
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
    report.table(("", "reached", "target"), rows)


def _first_text(run: Run[Answer]) -> float:
    return quantile([a.first - a.sent for a in settled(run) if a.first is not None], 0.5)


async def constrained(place: Workspace, questions: Questions, plan: Plan) -> Report:
    """Compare answers constrained to a schema with unconstrained ones, in turns."""
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
    """Return the part of a request that constrains the answer to a schema."""
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
