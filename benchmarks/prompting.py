"""Prompting without training: how far do instructions and examples in the prompt bring the base model?

    python -m benchmarks.prompting [--rows 300] [--out FILE]

Needs a checkout in which the pipeline has run, and a CPU that the engine `paged` runs on. Asks the base model
the same test rows in each of these ways, and compares the best of them with the tuned model's answers:

- `as trained`: the prompt that the tuned model gets, the answers of the stage `ask_base`;
- `instructed`: the task in words (all labels, or the answers' JSON schema);
- `N examples`: the N most similar training conversations as earlier turns as well, most similar last.

Where it is instructed, its answers are held to the labels, the JSON schema or the tools, as the service holds
them; those of the tuned model are not. Prints a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.conversations import run_many
from benchmarks.machine import machine
from monitoring.traffic.embeddings import Floats, embed
from services.engines.calls.allowed import AllowedCalls
from services.engines.calls.grammar import write_grammar
from services.engines.calls.notation import read_marks
from services.engines.paged.engine import PagedEngine
from services.engines.protocol import Sampling
from stages.common.artifacts import artifacts, read_json, reports, write_json
from stages.common.chat.calls import read_answer
from stages.common.chat.template import encode_prompt, end_of_turn_ids
from stages.common.errors import InputError
from stages.common.logs import set_quiet_environment
from stages.common.messages import Message
from stages.common.model.loading import load_tokenizer
from stages.common.model.results import Results, compare, with_intervals
from stages.common.model.results import Sampling as Resampling
from stages.common.params.loading import load_params
from stages.common.records import Row, read_rows
from stages.common.task.kinds import read_task
from stages.common.task.metrics import Metric
from stages.common.task.protocol import Task

EXAMPLES = (4, 8)
POOL = 20_000  # training rows that examples are chosen from, at most
CONTEXT_TOKENS = 4096
PROMPT_TOKENS = 3000  # of a prompt with its examples; the least similar are left out above it
SCHEMA_CHARS = 6000  # of a schema that is written into the prompt
SEED = 7


def describe_task(task: Task, answers: Sequence[str]) -> str:
    """Return the task in words, for the system prompt."""
    if labels := task.closed_set:
        return f"Answer with exactly one of these labels and nothing else:\n{'; '.join(labels)}"
    if task.answers_are_json:
        schema = json.dumps(task.derive_schema(answers), ensure_ascii=False)
        shown = f" that fits this JSON schema: {schema}" if len(schema) <= SCHEMA_CHARS else ""
        return f"Answer with one JSON object and nothing else{shown}"
    if task.kind == "tools":
        return "Call the functions that the request needs, or answer in words where none does."
    return "Answer with the result alone, without an explanation, in the style of earlier answers."


class Examples:
    """The training conversations, found by how similar their questions are."""

    def __init__(self, rows: Sequence[Row]) -> None:
        chosen = random.Random(SEED).sample(range(len(rows)), min(POOL, len(rows)))
        self._rows = [rows[place] for place in chosen]
        self._vectors: Floats = embed([row.question for row in self._rows], "minilm")

    def find(self, row: Row, count: int) -> list[Row]:
        """Return the most similar training rows, the most similar last; of one conversation only one."""
        scores = self._vectors @ embed([row.question], "minilm")[0]
        found: dict[str, Row] = {}
        for place in (-scores).argsort():
            one = self._rows[int(place)]
            found.setdefault(one.question, one)
            if len(found) == count:
                break
        return list(found.values())[::-1]


def write_prompt(row: Row, instruction: str, examples: Sequence[Row]) -> list[Message]:
    """Return the prompt of a row with an instruction in its system message, and examples before its turns."""
    turns = list(row.prompt)
    system = turns.pop(0).content if turns[0].role == "system" else ""
    head = Message("system", "\n\n".join(part for part in (system, instruction) if part))
    return [head, *(turn for one in examples for turn in one.messages if turn.role != "system"), *turns]


def encode_fitting_prompt(tokenizer: Any, row: Row, instruction: str, examples: Sequence[Row]) -> list[int]:
    """Return the token ids of a prompt, with as many of the examples as fit into `PROMPT_TOKENS`."""
    for first in range(len(examples) + 1):
        ids = encode_prompt(tokenizer, write_prompt(row, instruction, examples[first:]), row.tools)
        if len(ids) <= PROMPT_TOKENS:
            break
    return ids


def hold_answers(
    task: Task, tokenizer: Any, answers: Sequence[str], max_tokens: int
) -> Callable[[Row], Sampling]:
    """Return how a row's answer is written: greedily, held to the labels, the schema or the row's tools."""
    if task.answers_are_json:
        schema = json.dumps(task.derive_schema(answers))
        return lambda row: Sampling(max_tokens, json_schema=schema)
    if task.kind == "tools":
        marks = read_marks(tokenizer)
        return lambda row: Sampling(
            max_tokens, grammar=write_grammar(marks, AllowedCalls(row.tools)).text if row.tools else None
        )
    return lambda row: Sampling(max_tokens, choices=task.closed_set or ())


def ask(
    engine: PagedEngine,
    tokenizer: Any,
    rows: Sequence[Row],
    prompts: Sequence[list[int]],
    hold: Callable[[Row], Sampling],
) -> list[str]:
    """Return the base model's answers; an answer that was cut counts as it is."""
    ends = end_of_turn_ids(tokenizer)
    numbers = range(len(rows))
    found = asyncio.run(run_many(engine, prompts, lambda number: hold(rows[number]), numbers))
    return [
        read_answer(tokenizer, [token for token in ids if token not in ends], bool(row.tools))
        for row, (ids, _) in zip(rows, found, strict=True)
    ]


def read_answered(rows: int | None) -> tuple[list[Row], dict[str, list[str]]]:
    """Return test rows that both models answered, at most so many, and the answers of either.

    Raises:
        InputError: the stage `evaluate` has not run.
    """
    path = artifacts("evaluate") / "predictions.parquet"
    if not path.is_file():
        raise InputError(f"{path} does not exist", "run the pipeline first: perennial run")
    lines = {line["id"]: line for line in pq.read_table(path, columns=["id", "base", "tuned"]).to_pylist()}
    test = [row for row in read_rows(artifacts("split") / "test.parquet") if row.id in lines]
    if rows is not None and len(test) > rows:
        test = random.Random(SEED).sample(test, rows)
    return test, {model: [lines[row.id][model] for row in test] for model in ("base", "tuned")}


def ask_in_all_ways(rows: Sequence[Row], task: Task, max_tokens: int) -> Iterator[tuple[str, list[str], int]]:
    """Yield the name of each way, its answers, and the mean length of its prompts in tokens."""
    train = read_rows(artifacts("split") / "train.parquet")
    tokenizer = load_tokenizer(artifacts("fetch_base"))
    answers = [row.answer for row in train]
    instruction = describe_task(task, answers)
    hold = hold_answers(task, tokenizer, answers, max_tokens)
    examples = Examples(train)
    engine = PagedEngine(artifacts("fetch_base"), tokenizer, context_tokens=CONTEXT_TOKENS)
    try:
        for count in (0, *EXAMPLES):
            name = f"{count} examples" if count else "instructed"
            prompts = [
                encode_fitting_prompt(tokenizer, row, instruction, examples.find(row, count) if count else ())
                for row in rows
            ]
            started = time.monotonic()
            found = ask(engine, tokenizer, rows, prompts, hold)
            sys.stderr.write(f"{name}: {len(rows)} answers in {time.monotonic() - started:.0f} s\n")
            yield name, found, round(sum(map(len, prompts)) / len(prompts))
    finally:
        engine.close()


def compare_ways(max_rows: int | None) -> dict[str, Any]:
    """Ask in all ways; return the primary metric of each and of the tuned model, and how these differ."""
    params = load_params().evaluate
    task = read_task()
    resampling = Resampling(params.confidence, params.resamples, params.seed)
    rows, answers = read_answered(max_rows)
    groups, references = [row.group for row in rows], [row.answer for row in rows]
    limit = int(read_json(reports("ask_base") / "metrics.json")["answer_limit_tokens"])
    ways, lengths = {"as trained": answers["base"]}, {}
    for name, found, length in ask_in_all_ways(rows, task, limit):
        ways[name], lengths[name] = found, length

    def measure(found: Sequence[str]) -> dict[str, Metric]:
        return {task.primary: task.score(found, references)[task.primary]}

    def estimate(metrics: dict[str, Metric]) -> Results:
        return with_intervals(metrics, groups, resampling)

    metrics = {name: measure(found) for name, found in ways.items()}
    best = max(metrics, key=lambda name: metrics[name][task.primary].value())
    tuned = measure(answers["tuned"])
    return {
        "task": task.kind,
        "metric": task.primary,
        "rows": len(rows),
        "ways": {name: estimate(found)[task.primary] for name, found in metrics.items()},
        "prompt_tokens": lengths,
        "best": best,
        "tuned": estimate(tuned)[task.primary],
        "difference": compare(metrics[best], tuned, groups, resampling)[task.primary],
    }


def main() -> None:
    """Compare the ways and print the result."""
    set_quiet_environment()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=300, help="test rows, at most")
    parser.add_argument("--out", type=Path, help="where to write the result, as JSON")
    options = parser.parse_args()
    found = {"machine": machine(), **compare_ways(options.rows)}
    if options.out:
        write_json(options.out, found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
