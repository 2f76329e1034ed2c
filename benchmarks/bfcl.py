"""Calls of BFCL's questions (Berkeley Function Calling Leaderboard), scored by its own AST checker.

    pip install --no-deps --target FOLDER bfcl-eval==2026.3.23
    python -m benchmarks.bfcl FOLDER [--models base tuned] [--rows 400] [--out FILE]

Asks the engine `paged` the single-turn questions in Python of the wheel in FOLDER (Apache-2.0, data included;
its many dependencies are not needed), greedily, as the service asks them: with `tool_choice: auto`, so that a
call is held by its schema. `base` is `artifacts/fetch_base`, `tuned` is `artifacts/export`. Prints a table in
Markdown; `docs/benchmarks.md` keeps it.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from benchmarks.conversations import run_many
from benchmarks.machine import machine
from services.engines.calls.allowed import AllowedCalls
from services.engines.calls.grammar import write_grammar
from services.engines.calls.notation import read_marks
from services.engines.paged.engine import PagedEngine
from services.engines.protocol import Sampling
from stages.common.artifacts import artifacts, write_json
from stages.common.chat.calls import read_answer
from stages.common.chat.template import encode_prompt, end_of_turn_ids
from stages.common.logs import set_quiet_environment
from stages.common.messages import Message, Tool, read_calls
from stages.common.model.loading import load_tokenizer
from stages.common.statistics.intervals import compute_wilson

CATEGORIES = ("simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance")
MODEL = "perennial"
MAX_TOKENS = 256
CONTEXT_TOKENS = 4096
SEED = 7


@dataclass(frozen=True, slots=True)
class Question:
    """A question of BFCL: its text as messages, its functions, and the calls that are right."""

    category: str
    messages: tuple[Message, ...]
    functions: Sequence[Mapping[str, Any]]
    right: Sequence[Mapping[str, Any]]


class Scorer:
    """BFCL's own checker, from the folder of its wheel.

    Raises:
        SystemExit: the folder has no such wheel.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "bfcl_eval").is_dir():
            sys.exit(
                f"{folder} has no bfcl_eval; pip install --no-deps --target {folder} bfcl-eval==2026.3.23"
            )
        sys.path.insert(0, str(folder))
        # The checker asks it one thing: whether dots in names became underscores, as OpenAI's API wants. Its
        # own file imports the client of every provider.
        models = ModuleType("bfcl_eval.constants.model_config")
        models.MODEL_CONFIG_MAPPING = {MODEL: SimpleNamespace(underscore_to_dot=True)}  # type: ignore[attr-defined]
        sys.modules[models.__name__] = models
        checker = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker")
        self._check: Any = checker.ast_checker
        self._python: Any = checker.Language.PYTHON
        self.types: Mapping[str, str] = importlib.import_module(
            "bfcl_eval.constants.type_mappings"
        ).GORILLA_TO_OPENAPI

    def is_right(self, question: Question, calls: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether calls, each as {name: arguments}, are right; of irrelevant functions, none."""
        if question.category == "irrelevance":
            return not calls
        result = self._check(
            list(question.functions),
            list(calls),
            list(question.right),
            self._python,
            question.category,
            MODEL,
        )
        return bool(result["valid"])


def read_questions(folder: Path, category: str, rows: int) -> list[Question]:
    """Return the questions of a category, at most `rows` of them, drawn at random."""
    data = folder / "bfcl_eval" / "data"
    name = f"BFCL_v4_{category}.json"
    asked = [json.loads(line) for line in (data / name).read_text(encoding="utf-8").splitlines()]
    answers: dict[str, Any] = {}
    if (data / "possible_answer" / name).exists():
        for line in (data / "possible_answer" / name).read_text(encoding="utf-8").splitlines():
            found = json.loads(line)
            answers[found["id"]] = found["ground_truth"]
    chosen = random.Random(SEED).sample(asked, min(rows, len(asked)))
    return [
        Question(
            category,
            tuple(Message(message["role"], message["content"]) for message in one["question"][0]),
            one["function"],
            answers.get(one["id"], ()),
        )
        for one in chosen
    ]


def convert_tool(function: Mapping[str, Any], types: Mapping[str, str]) -> Tool:
    """Return a function of BFCL as a tool of OpenAI's API."""
    about = {
        "name": function["name"].replace(".", "_"),
        "description": function["description"],
        "parameters": _convert_schema({**function["parameters"], "type": "dict"}, types),
    }
    return Tool(json.dumps({"type": "function", "function": about}))


def _convert_schema(schema: Mapping[str, Any], types: Mapping[str, str]) -> dict[str, Any]:
    kept = {key: schema[key] for key in ("description", "enum", "required") if key in schema}
    kept["type"] = types[schema["type"]]
    if "properties" in schema:
        kept["properties"] = {
            name: _convert_schema(part, types) for name, part in schema["properties"].items()
        }
    elif kept["type"] == "object":
        kept["additionalProperties"] = True
    if "items" in schema:
        kept["items"] = _convert_schema(schema["items"], types)
    return kept


def ask(engine: PagedEngine, tokenizer: Any, questions: Sequence[Question], scorer: Scorer) -> list[bool]:
    """Return which questions were answered with the right calls."""
    marks, ends = read_marks(tokenizer), end_of_turn_ids(tokenizer)
    tools = [tuple(convert_tool(one, scorer.types) for one in q.functions) for q in questions]
    prompts = [encode_prompt(tokenizer, q.messages, own) for q, own in zip(questions, tools, strict=True)]
    grammars = [write_grammar(marks, AllowedCalls(own)).text for own in tools]

    def sample(number: int) -> Sampling:
        return Sampling(max_tokens=MAX_TOKENS, grammar=grammars[number])

    answers = asyncio.run(run_many(engine, prompts, sample, range(len(questions))))
    right = []
    for question, (ids, ended) in zip(questions, answers, strict=True):
        turn = read_calls(read_answer(tokenizer, [i for i in ids if i not in ends], has_tools=True))
        calls = [{call.name: call.values} for call in turn[1]] if turn and ended else []
        right.append(scorer.is_right(question, calls) and (ended or not turn))
    return right


def format_table(found: Mapping[str, Mapping[str, Sequence[bool]]]) -> str:
    """Return the shares of right answers with their 95 % intervals (Wilson), by category and model."""
    models = list(found)
    lines = [f"| category | questions | {' | '.join(models)} |", "|---|---:|" + "---:|" * len(models)]
    categories = [*CATEGORIES, "all"]
    for category in categories:
        cells = []
        for model in models:
            right = [one for name, own in found[model].items() if category in (name, "all") for one in own]
            low, high = compute_wilson(sum(right), len(right))
            cells.append(f"{sum(right) / len(right):.3f} ({low:.3f} to {high:.3f})")
        lines.append(f"| {category} | {len(right)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Ask the questions, print the table, and keep which were right."""
    set_quiet_environment()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the wheel bfcl-eval is installed")
    parser.add_argument("--models", nargs="+", choices=("base", "tuned"), default=["base", "tuned"])
    parser.add_argument("--rows", type=int, default=400, help="of each category, at most")
    parser.add_argument("--out", type=Path, help="where to write which answers were right, as JSON")
    options = parser.parse_args()
    scorer = Scorer(options.folder)
    tokenizer = load_tokenizer(artifacts("fetch_base"))
    files = {"base": artifacts("fetch_base"), "tuned": artifacts("export") / "model.gguf"}
    found: dict[str, dict[str, list[bool]]] = {}
    for model in options.models:
        engine = PagedEngine(files[model], tokenizer, context_tokens=CONTEXT_TOKENS)
        try:
            for category in CATEGORIES:
                questions = read_questions(options.folder, category, options.rows)
                found.setdefault(model, {})[category] = ask(engine, tokenizer, questions, scorer)
                own = found[model][category]
                print(f"{model} {category}: {sum(own)} of {len(own)} right", file=sys.stderr)
        finally:
            engine.close()
    print(json.dumps(machine()))
    print(format_table(found))
    if options.out:
        write_json(options.out, found)


if __name__ == "__main__":
    main()
