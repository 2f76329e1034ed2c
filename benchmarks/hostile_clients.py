"""Benchmark good clients of the service next to hostile ones: who loses answers, and who waits how long.

    python -m benchmarks.hostile_clients [--seconds 300] [--quiet-s 60] [--out hostile.json]

Eight good clients ask one question after the other, alone and next to eight hostile clients, each with
its own way to harm. Meanwhile the probes, the page and feedback are asked four times a second. The hostile
clients are a process of their own. The service runs as `make serve` starts it, in a folder of its own under
`.perennial`, with the model of this checkout: run the pipeline first.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.serving_children import from_row
from benchmarks.serving_load import Answer, Connection, Run, get, load
from benchmarks.serving_peers import (
    Child,
    Questions,
    Served,
    Workspace,
    read_questions,
    running,
    start,
    workspace,
)
from benchmarks.serving_report import Report, by_status, ms, quantile

GOOD_CLIENTS = 8
PROBE_EVERY_S = 0.25
ASKED_MS = 100  # of probes, page and feedback
ASKED_RATIO = 3  # of the good clients' p99, to the quiet one
HOLD_S = 15.0  # that a hostile connection waits for the service to end it, at most
FAILURES = re.compile(r"Traceback|the engine \w+ failed|restarting it|the service cannot start")


# The hostile clients: each harms for ever, and counts what came of it.

Count = Counter[str]
Attack = Callable[[int, Count], Awaitable[None]]


def make_request(port: int, body: Mapping[str, Any] | bytes, path: str = "/v1/chat/completions") -> bytes:
    """Return the bytes of a POST."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return make_head(port, len(content), path) + content


def make_head(port: int, size: int, path: str = "/v1/chat/completions") -> bytes:
    """Return the head of a POST."""
    lines = (f"POST {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", "Content-Type: application/json")
    return "\r\n".join((*lines, f"Content-Length: {size}", "", "")).encode()


def make_chat(**fields: Any) -> dict[str, Any]:
    """Return the body of a chat request."""
    return {"messages": [{"role": "user", "content": "turn on the lights"}], "max_tokens": 32, **fields}


def under_schema(schema: Any, **fields: Any) -> dict[str, Any]:
    """Return the body of a chat request whose answer must fit a schema."""
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return make_chat(response_format=wanted, **fields)


def with_tool(schema: Any, **fields: Any) -> dict[str, Any]:
    """Return the body of a chat request with a tool, an argument of which must fit a schema."""
    own = {"$defs": schema["$defs"]} if "$defs" in schema else {}
    parameters = {"type": "object", "properties": {"x": schema}, "required": ["x"], **own}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    return make_chat(tools=[tool], tool_choice="required", **fields)


async def send_schema(port: int, schema: Any, count: Count) -> None:
    """Send a schema as that of the answer, and as that of a tool."""
    for body in (under_schema(schema), with_tool(schema)):
        await send(port, make_request(port, body), count)


async def send(port: int, request: bytes, count: Count) -> None:
    """Send a request on a connection of its own, and read the response."""
    status = await post(port, request)
    count[str(status) if status else "closed"] += 1


async def post(port: int, request: bytes) -> int:
    """Return the status of the response to a request; 0 if the connection broke."""
    connection = Connection(port)
    try:
        return (await connection.ask(request, 0)).read().status
    finally:
        connection.close()


@asynccontextmanager
async def connect(port: int) -> Any:
    """Yield reader and writer of a connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4096)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def hold(port: int, pieces: bytes, connections: int, count: Count) -> None:
    """Open connections, send the same bytes on each, and wait until the service ends them."""
    async with AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(connect(port)) for _ in range(connections)]
        for _, writer in opened:
            writer.write(pieces)
        waits = [asyncio.create_task(reader.read(-1)) for reader, _ in opened]
        ended, held = await asyncio.wait(waits, timeout=HOLD_S)
        for task in held:
            task.cancel()
        count["ended by the service"] += len(ended)
        count["not ended"] += len(held)


def fork(depth: int) -> dict[str, Any]:
    """Return a schema whose references make 2 ** depth ways to read a value."""
    definitions = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(depth)}
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{depth}": {"enum": ["x"]}}}


def chain(length: int) -> dict[str, Any]:
    """Return a schema whose references form a chain."""
    links = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{length}": {"enum": ["x"]}}}


def nest(depth: int) -> dict[str, Any]:
    """Return a schema of lists within lists."""
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


async def send_references(port: int, count: Count) -> None:
    """Send schemas with 2^k ways to read a value, each another one, and chains of thousands of references."""
    for depth in itertools.count(30):
        await send_schema(port, fork(depth % 17 + 30) | {"title": str(depth)}, count)
        await send_schema(port, chain(27_000) | {"title": str(depth)}, count)
        await send_schema(port, chain(1500) | {"title": str(depth)}, count)


async def send_patterns(port: int, count: Count) -> None:
    """Send patterns with exponentially many states, or that exclude each other, or that backtrack."""
    for number in itertools.count():
        for schema in (
            {"type": "string", "pattern": f"^(a|b)*a(a|b){{{300 + number}}}$", "minLength": 3000},
            {"allOf": [{"type": "string", "pattern": f"{c}{number}"} for c in "abcdefghijk"]},
            {"type": "string", "pattern": f"^(a+)+{number}$"},
            {"type": "string", "pattern": f"^([ab]{{1,{900 + number}}}){{1,900}}$"},
        ):
            await send_schema(port, schema, count)


async def send_large_schemas(port: int, count: Count) -> None:
    """Send common multiples, hundreds of properties, deep and long schemas."""
    for number in itertools.count():
        many = {f"k{n}_{number}": {"type": "string"} for n in range(501)}
        texts = [f"{number}_{n}" for n in range(4000)]
        for schema in (
            {"allOf": [{"type": "integer", "multipleOf": n} for n in (4999, 4993 - 2 * (number % 500))]},
            {"type": "integer", "multipleOf": 9999991 + number},
            {"type": "object", "properties": many},
            {"type": "object", "properties": many, "required": list(many)},
            {"enum": texts},
            {"title": str(number), **nest(60)},
        ):
            await send_schema(port, schema, count)


async def send_edges(port: int, count: Count) -> None:
    """Send seeds and floats at their edges, with and without a schema."""
    edges: dict[str, Sequence[float]] = {
        "seed": (-1, -(2**63), 2**63 - 1, 2**63, 2**70),
        "temperature": (5e-324, 1e-40, 1e-5, 2.0, 1e308, float("nan")),
        "top_p": (5e-324, 1e-320, 1.0, -0.0, float("inf")),
        "frequency_penalty": (-2, 2, 1e-320, -1e308),
        "max_tokens": (1, 2**63, -1, 1e308),
        "top_logprobs": (20, 21, -1, 2**70),
    }
    for number in itertools.count():
        for field, values in edges.items():
            for value in values:
                more = {"temperature": 1.0, "logprobs": True, field: value}
                body = under_schema({"enum": ["ab", "cd"]}, **more) if number % 2 else make_chat(**more)
                await send(port, make_request(port, body), count)


async def send_halves(port: int, count: Count) -> None:
    """Hold connections with half a head, half a body, and nothing."""
    head = make_head(port, 1000)
    for pieces in itertools.cycle((head[:-2], head + b"{", b"", head[:10])):
        await hold(port, pieces, 32, count)


async def read_nothing(port: int, count: Count) -> None:
    """Ask for megabytes of log-probabilities, and read none of them."""
    body = {"prompt": ["x" * 400] * 20, "max_tokens": 0, "echo": True, "logprobs": 20}
    request = make_request(port, body, "/v1/completions")
    while True:
        async with connect(port) as (_, writer):
            writer.transport.pause_reading()
            writer.write(request)
            await asyncio.sleep(HOLD_S)
            count["left unread"] += 1


async def send_large_bodies(port: int, count: Count) -> None:
    """Send 20 MB, bodies just below the limit, deep nesting, and more digits than a number may have."""
    long = make_chat(messages=[{"role": "user", "content": "x" * 900_000}])
    many = make_chat(messages=[{"role": "user", "content": "x"}] * 20_000)
    for body in itertools.cycle(
        (
            b" " * 20_000_000,
            json.dumps(long).encode(),
            json.dumps(many).encode(),
            b"[" * 900_000,
            b'{"seed": ' + b"9" * 900_000 + b"}",
        )
    ):
        await send(port, make_request(port, body), count)


async def leave_early(port: int, count: Count) -> None:
    """Leave in the middle of long streams."""
    text = {"type": "string", "minLength": 300, "maxLength": 400}
    request = make_request(port, under_schema(text, stream=True, max_tokens=400))
    chance = random.Random(7)
    while True:
        async with connect(port) as (reader, writer):
            writer.write(request)
            with suppress(TimeoutError):
                async with asyncio.timeout(chance.uniform(0.0, 2.0)):
                    await reader.read(-1)
            writer.transport.abort()
            count["left"] += 1


ATTACKS: dict[str, Attack] = {
    "2^k references": send_references,
    "patterns": send_patterns,
    "large schemas": send_large_schemas,
    "numbers at their edges": send_edges,
    "half heads and bodies, idle connections": send_halves,
    "answers not read": read_nothing,
    "large bodies": send_large_bodies,
    "streams left early": leave_early,
}


async def attack(port: int) -> None:
    """Harm until the standard input ends; then print what came of it."""
    counts = {name: Counter[str]() for name in ATTACKS}
    tasks = [asyncio.create_task(_harm(run, port, counts[name])) for name, run in ATTACKS.items()]
    await asyncio.to_thread(sys.stdin.read)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    print(json.dumps(counts))


async def _harm(run: Attack, port: int, count: Count) -> None:
    while True:
        try:
            await run(port, count)
        except OSError:  # a connection that the service ended
            count["closed"] += 1
            await asyncio.sleep(0.05)


# What the good clients see.


async def probe(port: int, request_id: str, waits: dict[str, list[float]], failed: Count) -> None:
    """Ask probes, page and feedback in turn, until cancelled; record how long each took, s."""
    given = make_request(port, {"request_id": request_id, "thumb": "up"}, "/v1/feedback")
    while True:
        for path in waits:
            began = time.monotonic()
            if path == "/v1/feedback":
                status = await post(port, given)
            else:
                status, _ = await get(port, path, 60.0)
            waits[path].append(time.monotonic() - began)
            failed[path] += status != 200
        await asyncio.sleep(PROBE_EVERY_S)


async def measure_phase(ours: Served, seconds: float, request_id: str) -> tuple[Run[Answer], dict[str, Any]]:
    """Run the good clients and the probes for a while; return the answers, and the waits of the probes."""
    waits: dict[str, list[float]] = {path: [] for path in ("/livez", "/readyz", "/", "/v1/feedback")}
    failed: Count = Counter()
    probing = asyncio.create_task(probe(ours.port, request_id, waits, failed))
    try:
        run = await load(ours.port, ours.requests, GOOD_CLIENTS, from_row(0), seconds)
    finally:
        probing.cancel()
        with suppress(asyncio.CancelledError):
            await probing
    return run, {"waits": waits, "failed": failed}


async def measure(place: Workspace, questions: Questions, quiet_s: float, seconds: float) -> Report:
    """Measure the quiet phase, then the one with the hostile clients."""
    async with running(place, questions) as ours:
        first = (await load(ours.port, ours.requests, GOOD_CLIENTS, from_row(0), 0.0, 32)).answers[0]
        assert first.request_id is not None
        workers = {process.pid for process in ours.child.tree()}
        quiet = await measure_phase(ours, quiet_s, first.request_id)
        hostile = start(
            place,
            "hostile",
            [sys.executable, "-m", "benchmarks.hostile_clients", "--attack", str(ours.port)],
            wire=True,
        )
        try:
            await asyncio.sleep(2.0)
            attacked = await measure_phase(ours, seconds, first.request_id)
            counts = await asyncio.to_thread(_end_attack, hostile)
        finally:
            await asyncio.to_thread(hostile.end)
        after = await load(ours.port, ours.requests, 1, from_row(0), 0.0, 1)
        lost = len(workers - {process.pid for process in ours.child.tree()})
        failures = len(FAILURES.findall(ours.child.log.read_text(errors="replace")))
    return report(quiet, attacked, counts, after.answers, lost + failures)


def _end_attack(hostile: Child) -> dict[str, dict[str, int]]:
    printed, _ = hostile.process.communicate(timeout=60)  # which closes its input first
    found: dict[str, dict[str, int]] = json.loads(printed)
    return found


def report(
    quiet: tuple[Run[Answer], dict[str, Any]],
    attacked: tuple[Run[Answer], dict[str, Any]],
    counts: dict[str, dict[str, int]],
    after: Sequence[Answer],
    restarts: int,
) -> Report:
    """Return the table of both phases, and that of the hostile clients."""
    made = Report()
    phases = (quiet, attacked)
    answers = [run.answers for run, _ in phases]
    times = [[one.ended - one.sent for one in all_ if one.ok] for all_ in answers]
    tails = [quantile(one, 0.99) for one in times]
    failed = [sum(not one.ok for one in all_) for all_ in answers]
    shares = (0.5, 0.99, 1.0)
    rows: list[Sequence[object]] = [
        ("good clients: answers by status", *map(_show, map(by_status, answers)), "–"),
        ("good clients: failed", *failed, 0),
        ("good clients: answer, p50 / p99 / longest, ms", *(ms(one, *shares) for one in times), "–"),
        (
            "good clients: p99, under attack to alone",
            "",
            f"× {tails[1] / tails[0]:.2f}",
            f"≤ × {ASKED_RATIO}",
        ),
    ]
    for path in quiet[1]["waits"]:
        waits = [about["waits"][path] for _, about in phases]
        asked = f"≤ {ASKED_MS}"
        rows.append((f"{path}, p50 / p99 / longest, ms", *(ms(one, *shares) for one in waits), asked))
    rows += [
        ("probes, page and feedback: failed", *(sum(about["failed"].values()) for _, about in phases), 0),
        ("processes that ended, failures in the log", "", restarts, 0),
        ("a request afterwards", "", _show(by_status(after)), 200),
    ]
    attacked_s = attacked[0].stopped - attacked[0].started
    made.table(
        (f"{GOOD_CLIENTS} good clients", "alone", f"with {len(counts)} hostile, {attacked_s:.0f} s", "asked"),
        rows,
    )
    made.table(("hostile client", "what came of it"), [(name, _show(one)) for name, one in counts.items()])
    made.figures = {
        "answers": [len(all_) for all_ in answers],
        "failed": failed,
        "p99_s": tails,
        "probes": [about["waits"] for _, about in phases],
        "probes_failed": [dict(about["failed"]) for _, about in phases],
        "restarts": restarts,
        "hostile": counts,
    }
    return made


def _show(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in sorted(counts.items())) or "–"


def main() -> None:
    """Measure both phases and print Markdown; or, as a child, be the hostile clients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="good clients next to hostile ones")
    parser.add_argument("--quiet-s", type=float, default=60.0, help="good clients alone")
    parser.add_argument("--out", type=Path, help="also write all figures to this file, as JSON")
    parser.add_argument("--attack", type=int, metavar="PORT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.attack:
        asyncio.run(attack(arguments.attack))
        return
    with workspace() as place:
        made = asyncio.run(measure(place, read_questions(), arguments.quiet_s, arguments.seconds))
    print("\n".join(made.lines))
    if arguments.out:
        text = json.dumps({"machine": machine(), **made.figures}, indent=2)
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
