"""Run `perennial init` and the stages on many rows: processor time and peak memory.

    python -m benchmarks.large_data {short,labels,passages} [--rows N] [--chars N] [--stages ...]

- `short`: commands of about 40 characters with answers of their own kind
- `labels`: messages of about 60 characters with one of 77 labels, set up by `init` without an edit
- `passages`: questions under passages of `--chars` characters on average, the passage as group

Each step is a process of its own. The base model is one of random weights (`large_data_steps`), so that what
is measured is how the rows are handled: `finetune` ends before its first update, `ask_base` and `evaluate`
at their first answer. Prints a table in Markdown; `docs/benchmarks.md` keeps it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.large_data_steps import CONTEXT_TOKENS
from benchmarks.machine import machine

ROOT = Path(__file__).parents[1]
DATA_STAGES = ("collect", "curate", "validate", "check_bias", "split")
MODEL_STAGES = ("preflight", "estimate", "ask_base", "finetune", "export", "evaluate", "model_card")
# The line of its log at which a stage has its rows ready and begins to compute.
ENDED_AT = {
    "ask_base": r"progress \d+/\d+ base",
    "finetune": "training on",
    "evaluate": r"progress \d+/\d+ tuned",
}
WORDS = 20_000  # different words, drawn with the frequencies of Zipf's law
# Of 1,000 letters of English (P. Norvig, "English letter frequency counts", 2013).
LETTERS = "etaoinsrhldcumfpgwybvkxjqz"
FREQUENCIES = (
    125, 93, 80, 76, 76, 72, 65, 63, 51, 41, 38, 33, 27, 25, 24, 21, 19, 17, 17, 15, 11, 5, 2, 2, 1, 1,
)  # fmt: skip
LABELS = 77
QUESTIONS_A_PASSAGE = 5


def draw_words(rng: random.Random) -> Iterator[str]:
    """Yield invented words without end, as frequent as words of a language are, of as many different 3-grams.

    All long passages of words made of a few syllables would have the same 3-grams.
    """
    words = ["".join(rng.choices(LETTERS, FREQUENCIES, k=rng.randint(2, 9))) for _ in range(WORDS)]
    weights = [1 / rank for rank in range(1, WORDS + 1)]
    while True:
        yield from rng.choices(words, weights, k=100_000)


def write_short(path: Path, rows: int, _chars: int) -> None:
    """Write commands with JSON-free answers: rows are short and mostly different."""
    words = draw_words(random.Random(1))
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            prompt = " ".join(next(words) for _ in range(8))
            file.write(json.dumps({"prompt": prompt, "completion": f"do {number % 5000}"}) + "\n")


def write_labels(path: Path, rows: int, _chars: int) -> None:
    """Write messages with one of the labels, each of which has words of its own."""
    rng = random.Random(2)
    words = draw_words(rng)
    own = [[next(words) for _ in range(20)] for _ in range(LABELS)]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            label = rng.randrange(LABELS)
            text = " ".join([*(next(words) for _ in range(9)), *rng.sample(own[label], 3)])
            file.write(json.dumps({"text": text, "label": f"topic_{label}"}) + "\n")


def write_passages(path: Path, rows: int, chars: int) -> None:
    """Write questions under passages of `chars` characters on average; the longest passage comes first."""
    rng = random.Random(3)
    words = draw_words(rng)
    passage = ""
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            if number % QUESTIONS_A_PASSAGE == 0:
                length = 2 * chars if number == 0 else rng.randint(100, 2 * chars - 100)
                passage = " ".join(next(words) for _ in range(length // 2))[:length]
            question = " ".join(next(words) for _ in range(8))
            record = {"question": f"{question}?", "context": passage, "answer": f"answer {number}"}
            file.write(json.dumps({**record, "language": rng.choice(["en", "de"])}) + "\n")


WRITERS = {"short": write_short, "labels": write_labels, "passages": write_passages}
COLUMNS: dict[str, dict[str, Any]] = {
    "short": {"prompt_column": "prompt", "completion_column": "completion"},
    "labels": {},
    "passages": {
        "prompt_column": "question",
        "context_column": "context",
        "completion_column": "answer",
        "group_column": "context",
        "tag_columns": ["language"],
    },
}


def write_params(folder: Path, name: str, chars: int) -> None:
    """Write params.yaml for texts of any length; `labels` is left to `init`."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    source = {"kind": "file", "path": f"data/{name}.jsonl", "license": "cc0-1.0", **COLUMNS[name]}
    values["collect"]["sources"] = [source]
    values["task"] |= {"kind": "text", "label_key": None, "stratify_by": None, "slices": []}
    values["task"]["system_prompt"] = None
    values["model_card"] |= {"name": name, "intended_use": None, "out_of_scope": None}
    longest = 2 * chars + 4000
    values["curate"]["max_question_chars"] = values["validate"]["max_prompt_chars"] = longest
    values["finetune"]["max_length"] = CONTEXT_TOKENS
    values["ask_base"]["max_rows"] = None
    values["check_bias"]["groups"] = {"language": {"min_representation_ratio": 0.1, "max_cramers_v": 0.5}}
    (folder / "params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")


def measure(name: str, command: Sequence[str], folder: Path) -> dict[str, float]:
    """Run a command to its end, or to the line of `ENDED_AT`; return its seconds and peak memory in GiB."""
    began = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = re.compile(ENDED_AT[name]) if name in ENDED_AT else None
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            text=True,
        )
        is_ended = False
        for line in process.stdout or ():
            log.write(line)
            if ended and ended.search(line):
                is_ended = True
                process.kill()
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "exit": 0 if is_ended else process.returncode,
        "seconds": time.monotonic() - began,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_gib": used.ru_maxrss / 2**20,
    }


def list_commands(stages: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each step with its module and arguments, and before it what it needs."""
    helper = "benchmarks.large_data_steps"
    before = {"preflight": "base", "export": "adapter", "evaluate": "answers"}
    for stage in stages:
        if stage in before:
            yield before[stage], f"{helper} {before[stage]}"
        modules = {"estimate": "stages.common.run_estimate", "model_card": f"{helper} model_card"}
        yield stage, modules.get(stage, f"stages.{stage}")


def main() -> None:
    """Write the rows, run the steps and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", choices=WRITERS)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--chars", type=int, default=16_000, help="characters of a passage, on average")
    parser.add_argument("--folder", type=Path, help="kept afterwards; its rows are used again")
    parser.add_argument(
        "--stages", nargs="*", choices=["init", *DATA_STAGES, *MODEL_STAGES], default=list(DATA_STAGES)
    )
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="perennial-large-data-"))
    (folder / "data").mkdir(parents=True, exist_ok=True)
    path = folder / "data" / f"{arguments.data}.jsonl"
    if not path.exists():
        WRITERS[arguments.data](path, arguments.rows, arguments.chars)
    stages = [stage for stage in arguments.stages if stage != "init"]
    steps = {name: [sys.executable, "-m", *module.split()] for name, module in list_commands(stages)}
    if arguments.data == "labels" or "init" in arguments.stages:
        shutil.copy(ROOT / "params.yaml", folder)
        columns = [
            option
            for key, value in COLUMNS[arguments.data].items()
            for option in (f"--{key.replace('_', '-')}", value if isinstance(value, str) else ",".join(value))
        ]
        init = [sys.executable, "-m", "flows.init", "--license", "cc0-1.0", str(path), *columns]
        steps = {"init": init, **steps}
    if arguments.data != "labels":
        write_params(folder, arguments.data, arguments.chars)
    print(json.dumps(machine()))
    print(f"| {arguments.rows:,} rows, {arguments.data} | processor, s | time, s | peak memory, GiB | exit |")
    print("|---|---:|---:|---:|---:|")
    for name, command in steps.items():
        found = measure(name, command, folder)
        print(
            f"| `{name}` | {found['cpu_seconds']:.0f} | {found['seconds']:.0f} | "
            f"{found['peak_gib']:.2f} | {found['exit']:.0f} |",
            flush=True,
        )
        if name == "init" and arguments.data != "labels":
            write_params(folder, arguments.data, arguments.chars)  # the stages' own


if __name__ == "__main__":
    main()
