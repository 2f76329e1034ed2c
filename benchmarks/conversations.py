"""Conversations with tools: are calls held by their schemas, at which cost, and how fast are they learned?

    python -m benchmarks.conversations [required grammar training] [--calls 10000] [--rows 96] [--out FILE]
    python -m benchmarks.conversations clients [--url http://127.0.0.1:3000/v1] [--count 50] [--auto]

The first needs `artifacts/fetch_base` and `artifacts/split` of the task with tools: `make run TASK=tools`, or
`dvc repro preflight` with its parameters. The base model was never trained to call tools. Prints a JSON
object; `docs/benchmarks.md` keeps the results.

- `required`: calls that the grammar forces at temperature 1: how many are malformed, name an unknown tool, or
  have arguments outside the schema.
- `grammar`: tokens a second of calls that are held, next to those of free text, in turns; and the time to
  compile 60 tools.
- `training`: tokens a second of conversations of several turns in one sequence, next to those of their first
  turns alone, in turns.
- `clients` (only if it is named): conversations of the clients openai, pydantic-ai and litellm with a running
  service (`make serve`), with tools that run (`benchmarks/tool_clients.py`). Calls are forced, or left to the
  model with `--auto`. A client that is not installed is named:
  `pip install "pydantic-ai-slim[openai]" litellm`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from benchmarks.machine import machine
from benchmarks.tool_clients import CLIENTS, find_server, run_client
from services.engines.calls.allowed import AllowedCalls, read_schema
from services.engines.calls.grammar import write_grammar
from services.engines.calls.notation import read_marks
from services.engines.grammar import Grammars
from services.engines.paged.engine import PagedEngine
from services.engines.protocol import Sampling, Step
from stages.common.artifacts import artifacts, write_json
from stages.common.chat.calls import read_answer
from stages.common.chat.template import encode_conversation, encode_example, encode_prompt, end_of_turn_ids
from stages.common.chat.turns import list_learned, unroll
from stages.common.logs import set_quiet_environment
from stages.common.messages import Tool, read_calls
from stages.common.model.loading import load_tokenizer
from stages.common.params.loading import load_params
from stages.common.records import Row, read_rows

AT_ONCE = 16  # answers written together
FORCED_AT_ONCE = 32  # of forced calls, whose speed is not measured: as many as the engine runs
MAX_TOKENS = 400
ROUND = 10 * FORCED_AT_ONCE  # forced answers between two lines of progress
REPEATS = 5
MANY_TOOLS = 60
PARTS = ("required", "grammar", "training", "clients")


def read_questions(tokenizer: Any) -> tuple[tuple[Tool, ...], list[list[int]]]:
    """Return the tools of the test rows, and the prompts of their first questions."""
    rows = [row for row in read_rows(artifacts("split") / "test.parquet") if row.tools]
    first = [row for row in rows if sum(m.role == "user" for m in row.messages) == 1]
    return first[0].tools, [encode_prompt(tokenizer, row.prompt, row.tools) for row in first]


async def generate(engine: PagedEngine, prompt: Sequence[int], sampling: Sampling) -> tuple[list[int], bool]:
    """Return the tokens of an answer, and whether it ended by itself."""
    ids, ended = list[int](), False
    async with aclosing(cast(AsyncGenerator[Step], engine.generate(list(prompt), sampling))) as steps:
        async for step in steps:
            ids += step.token_ids
            ended = step.finish_reason == "stop"
    return ids, ended


async def run_many(
    engine: PagedEngine,
    prompts: Sequence[Sequence[int]],
    samplings: Callable[[int], Sampling],
    numbers: range,
    at_once: int = AT_ONCE,
) -> list[tuple[list[int], bool]]:
    """Return the answers of these numbers, some at once."""
    places = asyncio.Semaphore(at_once)

    async def one(number: int) -> tuple[list[int], bool]:
        async with places:
            return await generate(engine, prompts[number % len(prompts)], samplings(number))

    return list(await asyncio.gather(*map(one, numbers)))


def measure_required(engine: PagedEngine, tokenizer: Any, count: int, start: int = 0) -> dict[str, int]:
    """Force `count` calls or more at temperature 1 and count what is wrong; `cut`: reached MAX_TOKENS.

    Args:
        start: the number of the first request, which is its seed: another run goes on where one has ended.
    """
    from jsonschema import Draft202012Validator

    tools, prompts = read_questions(tokenizer)
    grammar = write_grammar(read_marks(tokenizer), AllowedCalls(tools, "required")).text
    checks = {tool.name: Draft202012Validator(read_schema(tool)) for tool in tools}

    def sample(number: int) -> Sampling:
        return Sampling(max_tokens=MAX_TOKENS, temperature=1.0, seed=number, grammar=grammar)

    ends = end_of_turn_ids(tokenizer)
    found: Counter[str] = Counter(malformed=0, cut=0, calls=0)
    while found["calls"] < count:
        first = start + found["requests"]
        numbers = range(first, first + ROUND)
        for ids, ended in asyncio.run(run_many(engine, prompts, sample, numbers, FORCED_AT_ONCE)):
            found["requests"] += 1
            if not ended:
                found["cut"] += 1
                continue
            turn = read_calls(read_answer(tokenizer, [i for i in ids if i not in ends], has_tools=True))
            if turn is None:
                found["malformed"] += 1
                continue
            for call in turn[1]:
                found["calls"] += 1
                found["unknown tools"] += call.name not in checks
                found["arguments outside the schema"] += not checks[call.name].is_valid(call.values)
        sys.stderr.write(f"{dict(found)}\n")
    return dict(found)


def measure_grammar(engine: PagedEngine, tokenizer: Any) -> dict[str, float]:
    """Compare the speed of held calls with that of free text, and compile a grammar of many tools."""
    tools, prompts = read_questions(tokenizer)
    marks = read_marks(tokenizer)
    grammar = write_grammar(marks, AllowedCalls(tools, "required")).text
    speeds: dict[str, list[float]] = {"free": [], "held": []}
    for repeat in range(REPEATS):
        for name, text in (("free", None), ("held", grammar)):
            sampling = Sampling(max_tokens=48, temperature=1.0, seed=repeat, grammar=text)
            start = time.perf_counter()
            answers = asyncio.run(run_many(engine, prompts, lambda _, one=sampling: one, range(2 * AT_ONCE)))  # type: ignore[misc]
            speeds[name].append(sum(len(ids) for ids, _ in answers) / (time.perf_counter() - start))
    grammars = Grammars(tokenizer, len(tokenizer), min(end_of_turn_ids(tokenizer)))
    compiled = []
    for repeat in range(REPEATS):
        many = tuple(_rename(tools[n % len(tools)], f"tool_{repeat}_{n}") for n in range(MANY_TOOLS))
        start = time.perf_counter()
        text = write_grammar(marks, AllowedCalls(many, "required")).text
        grammars.compile_for(Sampling(max_tokens=1, grammar=text))
        compiled.append(time.perf_counter() - start)
    ratio = statistics.median(h / f for h, f in zip(speeds["held"], speeds["free"], strict=True))
    return {
        "free_tokens_per_s": round(statistics.median(speeds["free"]), 1),
        "held_tokens_per_s": round(statistics.median(speeds["held"]), 1),
        "ratio": round(ratio, 3),
        f"compile_{MANY_TOOLS}_tools_ms": round(1000 * statistics.median(compiled), 1),
    }


def _rename(tool: Tool, name: str) -> Tool:
    """Return a tool with another name and schema: equal schemas are compiled once."""
    value = tool.value
    value["function"]["name"] = name
    value["function"]["parameters"]["properties"][f"{name}_option"] = {"type": "integer"}
    return Tool(json.dumps(value))


def measure_training(tokenizer: Any, count: int) -> dict[str, float]:
    """Train on conversations of several turns as they are, and on their first turns alone."""
    from stages.finetune.adapter import build_model
    from stages.finetune.objectives.answers import Answers
    from stages.finetune.recipe import Recipe
    from stages.finetune.trainer import train

    settings = load_params().finetune
    recipe = replace(Recipe(**settings.model_dump(include=set(Recipe.__dataclass_fields__))), epochs=1)
    rows = [row for row in read_rows(artifacts("split") / "train.parquet") if len(_learned(row)) > 1][:count]
    first = [next(unroll([row], "all")) for row in rows]
    several = [encode_conversation(tokenizer, row.messages, row.tools, _learned(row)) for row in rows]
    sets = {
        "several": [example for examples in several for example in examples],
        "one": [encode_example(tokenizer, row.messages, row.tools) for row in first],
    }
    speeds: dict[str, list[float]] = {name: [] for name in sets}
    for _ in range(2):
        for name, examples in sets.items():
            with tempfile.TemporaryDirectory() as folder:
                model = build_model(artifacts("fetch_base"), recipe, None)
                trained = train(
                    model, Answers(examples), [], tokenizer.pad_token_id, recipe, Path(folder), 1_000_000
                )
            speeds[name].append(trained.tokens / trained.seconds)
    return {
        "rows": len(rows),
        "several_tokens_per_s": round(statistics.median(speeds["several"]), 1),
        "one_tokens_per_s": round(statistics.median(speeds["one"]), 1),
        "ratio": round(
            statistics.median(a / b for a, b in zip(speeds["several"], speeds["one"], strict=True)), 3
        ),
    }


def _learned(row: Row) -> list[int]:
    return list_learned(row.messages, "all")


def main() -> None:
    """Run the measurements that are named, or all."""
    set_quiet_environment()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "what", nargs="*", default=[], help="required, grammar, training (default: these), clients"
    )
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--start", type=int, default=0, help="required: the number of the first request")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--url", default="http://127.0.0.1:3000/v1", help="clients: the service's API")
    parser.add_argument("--key", default="none", help="clients: a key of the service")
    parser.add_argument("--count", type=int, default=50, help="clients: conversations of each")
    parser.add_argument("--auto", action="store_true", help="clients: the model decides whether it calls")
    parser.add_argument("--out", type=Path, help="where to write the results as JSON, too")
    options = parser.parse_args()
    if unknown := set(options.what) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    wanted = options.what or ["required", "grammar", "training"]
    found: dict[str, Any] = {"machine": machine()}
    if "clients" in wanted:
        server = find_server(options.url, options.key)
        found["clients"] = {
            name: run_client(name, server, options.count, "auto" if options.auto else "required")
            for name in CLIENTS
        }
    if set(wanted) - {"clients"}:
        found |= _measure_model(options, wanted)
    if options.out:
        write_json(options.out, found)
    print(json.dumps(found, indent=2))


def _measure_model(options: argparse.Namespace, wanted: Sequence[str]) -> dict[str, Any]:
    """Return the measurements that need no service, of those that are named."""
    found: dict[str, Any] = {}
    tokenizer = load_tokenizer(artifacts("fetch_base"))
    if {"required", "grammar"} & set(wanted):
        engine = PagedEngine(artifacts("fetch_base"), tokenizer)
        try:
            if "required" in wanted:
                found["required"] = measure_required(engine, tokenizer, options.calls, options.start)
            if "grammar" in wanted:
                found["grammar"] = measure_grammar(engine, tokenizer)
        finally:
            engine.close()
    if "training" in wanted:
        found["training"] = measure_training(tokenizer, options.rows)
    return found


if __name__ == "__main__":
    main()
