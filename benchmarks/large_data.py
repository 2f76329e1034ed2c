"""Run `perennial init` or the stages from `collect` to `split` on many rows: processor time and peak memory.

    python -m benchmarks.large_data {short,labels,passages} [--rows N] [--folder FOLDER] [--stages ...]

- `short`: commands of about 40 characters with answers of their own kind, stages only
- `labels`: messages of about 60 characters with one of 77 labels, set up by `init` without an edit
- `passages`: questions under passages of up to 16,000 characters, the passage as group, stages only

Each step is a process of its own in FOLDER (default: a new temporary folder). Prints a table in Markdown;
`docs/benchmarks.md` keeps it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.machine import machine

ROOT = Path(__file__).parents[1]
STAGES = ("collect", "curate", "validate", "check_bias", "split")
WORDS = 20_000  # different words, drawn with the frequencies of Zipf's law
LABELS = 77
PASSAGE_CHARS = 16_000
QUESTIONS_A_PASSAGE = 5


def draw_words(rng: random.Random) -> Iterator[str]:
    """Yield invented words without end, as frequent as words of a language are."""
    syllables = [first + last for first in "bdfgklmnprstvz" for last in ("a", "e", "in", "o", "un", "ai")]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(WORDS)]
    weights = [1 / rank for rank in range(1, WORDS + 1)]
    while True:
        yield from rng.choices(words, weights, k=100_000)


def write_short(path: Path, rows: int) -> None:
    """Write commands with JSON-free answers: rows are short and mostly different."""
    words = draw_words(random.Random(1))
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            prompt = " ".join(next(words) for _ in range(8))
            file.write(json.dumps({"prompt": prompt, "completion": f"do {number % 5000}"}) + "\n")


def write_labels(path: Path, rows: int) -> None:
    """Write messages with one of the labels, each of which has words of its own."""
    rng = random.Random(2)
    words = draw_words(rng)
    own = [[next(words) for _ in range(20)] for _ in range(LABELS)]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            label = rng.randrange(LABELS)
            text = " ".join([*(next(words) for _ in range(9)), *rng.sample(own[label], 3)])
            file.write(json.dumps({"text": text, "label": f"topic_{label}"}) + "\n")


def write_passages(path: Path, rows: int) -> None:
    """Write questions under passages; the longest passage comes first."""
    rng = random.Random(3)
    words = draw_words(rng)
    passage = ""
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            if number % QUESTIONS_A_PASSAGE == 0:
                chars = PASSAGE_CHARS if number == 0 else rng.randint(100, PASSAGE_CHARS)
                text = " ".join(next(words) for _ in range(chars // 2))
                passage = text[:chars]
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


def write_params(folder: Path, name: str) -> None:
    """Write params.yaml for texts of any length; `labels` is left to `init`."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    source = {"kind": "file", "path": f"data/{name}.jsonl", "license": "cc0-1.0", **COLUMNS[name]}
    values["collect"]["sources"] = [source]
    values["task"] |= {"kind": "text", "label_key": None, "stratify_by": None, "slices": []}
    values["task"]["system_prompt"] = None
    values["model_card"] |= {"name": name, "intended_use": None, "out_of_scope": None}
    values["curate"]["max_question_chars"] = 20_000
    values["validate"]["max_prompt_chars"] = 20_000
    values["check_bias"]["groups"] = {"language": {"min_representation_ratio": 0.1, "max_cramers_v": 0.5}}
    (folder / "params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")


def measure(command: Sequence[str], folder: Path) -> dict[str, float]:
    """Run a command to its end; return its exit code, seconds, processor seconds and peak memory in GiB."""
    began = time.monotonic()
    log = folder / f"{command[-1].replace('/', '-')}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "exit": process.returncode,
        "seconds": time.monotonic() - began,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_gib": used.ru_maxrss / 2**20,
    }


def main() -> None:
    """Write the rows, run the steps and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", choices=WRITERS)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="kept afterwards")
    parser.add_argument("--stages", nargs="+", default=list(STAGES))
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="perennial-large-data-"))
    (folder / "data").mkdir(parents=True, exist_ok=True)
    path = folder / "data" / f"{arguments.data}.jsonl"
    WRITERS[arguments.data](path, arguments.rows)
    steps = {stage: [sys.executable, "-m", f"stages.{stage}"] for stage in arguments.stages}
    if arguments.data == "labels":
        shutil.copy(ROOT / "params.yaml", folder)
        steps = {"init": [sys.executable, "-m", "flows.init", "--license", "cc0-1.0", str(path)], **steps}
    else:
        write_params(folder, arguments.data)
    print(json.dumps(machine()))
    print(f"| {arguments.rows:,} rows, {arguments.data} | processor, s | time, s | peak memory, GiB | exit |")
    print("|---|---:|---:|---:|---:|")
    for name, command in steps.items():
        found = measure(command, folder)
        print(
            f"| `{name}` | {found['cpu_seconds']:.0f} | {found['seconds']:.0f} | "
            f"{found['peak_gib']:.2f} | {found['exit']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
