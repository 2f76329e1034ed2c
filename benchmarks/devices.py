"""Training in several processes: the stage `finetune` in one process and in two, with a core for each.

    python -m benchmarks.devices [--rows 256] [--batch-size 16] [--processes 2] [--repeats 1]

Needs `artifacts/fetch_base` and `artifacts/split` (`dvc repro split`), and as many free cores. The same rows
in the same batches, in turns; the time is that of the training, including the first, slow step. Prints a
JSON object with the tokens per second and their ratio; `docs/benchmarks.md` keeps the results.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.machine import machine
from stages.common.artifacts import artifacts, read_json, reports
from stages.common.records import Row, read_rows, write_rows

ROOT = Path(__file__).parents[1]


def make_project(folder: Path, rows: list[Row], **settings: Any) -> None:
    """Lay out what the stage reads: the base model of this checkout, some of its rows, and params.yaml."""
    base = artifacts("fetch_base").resolve()
    split = folder / artifacts("split")
    split.mkdir(parents=True)
    (folder / artifacts("fetch_base")).symlink_to(base)
    write_rows(split / "train.parquet", rows)
    write_rows(split / "validation.parquet", [])
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["finetune"].update(warm_start_from=None, checkpoint_every_steps=1_000_000, **settings)
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")


def train(rows: list[Row], **settings: Any) -> dict[str, Any]:
    """Run the stage with one thread for each process, and return what it measured."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_project(folder, rows, **settings)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, "-m", "stages.finetune"],
            cwd=folder,
            env=environment,
            check=True,
            stdout=sys.stderr,
        )
        metrics = read_json(folder / reports("finetune") / "metrics.json")
    found = {"train_loss": metrics["train_loss"], "dtype": metrics["dtype"], **metrics["throughput"]}
    print(f"{settings}: {found}", file=sys.stderr)
    return found


def main() -> None:
    """Train in one process and in several, in turns; print the median speeds and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()

    rows = random.Random(7).sample(read_rows(artifacts("split") / "train.parquet"), arguments.rows)
    counts = (1, arguments.processes)
    runs: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    for _ in range(arguments.repeats):
        for count in counts:
            runs[count].append(train(rows, devices=count, batch_size=arguments.batch_size))
    speed = {n: statistics.median(run["tokens_per_second"] for run in found) for n, found in runs.items()}
    report = {
        "machine": machine(),
        "rows": arguments.rows,
        "batch_size": arguments.batch_size,
        "tokens_per_second": speed,
        "ratio": round(speed[arguments.processes] / speed[1], 2),
        "runs": runs,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
