"""Training in several processes: the stage `finetune` in one process and in two, with a core for each.

    python -m benchmarks.devices [--rows 256] [--batch-size 16] [--processes 2] [--repeats 1]
        [--sharding none | full]
    python -m benchmarks.devices --simulate [--rows 256] [--batch-size 16] [--processes 16] [--repeats 1]

Needs `artifacts/fetch_base`, `artifacts/curate` and `artifacts/split` (`dvc repro split`), and as many free
cores. The same rows in the same batches, in turns; the time is that of the training, including the first,
slow step. Prints a JSON object with the tokens per second and their ratio; `docs/benchmarks.md` keeps the
results.

With `--simulate` one core is enough, and the numbers of processes are 2, 4 and so on up to `--processes`: the
computing of each share of a batch is measured in one process with one thread, and the exchange is computed
for assumed networks (`benchmarks/scaling.py`). Prints these assumptions with the result.
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from benchmarks.machine import machine
from benchmarks.scaling import LINKS, format_table, simulate
from stages.common.artifacts import artifacts, read_json, reports
from stages.common.model.loading import count_parameters
from stages.common.records import Row, read_rows, write_rows

ROOT = Path(__file__).parents[1]


def make_project(folder: Path, rows: list[Row], **settings: Any) -> None:
    """Lay out what the stage reads: base model and task of this checkout, some of its rows, parameters."""
    split = folder / artifacts("split")
    split.mkdir(parents=True)
    for stage in ("fetch_base", "curate"):
        (folder / artifacts(stage)).symlink_to(artifacts(stage).resolve())
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
    known = {name: metrics[name] for name in ("train_loss", "dtype", "trained_parameters")}
    found: dict[str, Any] = known | metrics["throughput"]
    print(f"{settings}: {found}", file=sys.stderr)
    return found


def measure_shares(rows: list[Row], batch_size: int, processes: int, repeats: int) -> dict[str, Any]:
    """Return how a training would scale: measured shares of a batch, and assumed networks.

    A share of a batch computes as a batch of as many rows does. Batches have rows of similar lengths, so the
    shares of one are taken to be alike.
    """
    counts = [1]
    while 2 * counts[-1] <= min(processes, batch_size):
        counts.append(2 * counts[-1])
    runs: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    for _ in range(repeats):
        for count in counts:
            # A last batch that is smaller would count as a whole one.
            runs[count].append(train(rows, devices=1, batch_size=batch_size // count))
    updates = {count: -(-len(rows) // (batch_size // count)) for count in counts}
    seconds = {
        n: statistics.median(run["seconds"] for run in found) / updates[n] for n, found in runs.items()
    }
    trained = runs[1][0]["trained_parameters"]
    weights = count_parameters(artifacts("fetch_base"))
    config = read_json(artifacts("fetch_base") / "config.json")
    element_bytes = 4 if runs[1][0]["dtype"] == "float32" else 2
    whole = simulate(seconds, LINKS, 4 * trained)
    shared = simulate(
        seconds,
        LINKS,
        4 * trained,
        weight_bytes=element_bytes * weights,
        groups=config["num_hidden_layers"] + 1,
    )
    print(f"each process has the whole model:\n{format_table(whole)}", file=sys.stderr)
    print(f"the processes share the model:\n{format_table(shared)}", file=sys.stderr)
    return {
        "links": {name: asdict(link) for name, link in LINKS.items()},
        "gradient_bytes": 4 * trained,
        "weight_bytes": element_bytes * weights,
        "seconds_of_update": {n: round(value, 4) for n, value in seconds.items()},
        "whole": whole,
        "shared": shared,
        "runs": runs,
    }


def main() -> None:
    """Train in one process and in several, in turns, or simulate it; print speeds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--sharding", choices=("none", "full"), default="none")
    parser.add_argument("--simulate", action="store_true")
    arguments = parser.parse_args()

    rows = random.Random(7).sample(read_rows(artifacts("split") / "train.parquet"), arguments.rows)
    about = {"machine": machine(), "rows": arguments.rows, "batch_size": arguments.batch_size}
    if arguments.simulate:
        found = measure_shares(rows, arguments.batch_size, arguments.processes, arguments.repeats)
        print(json.dumps(about | found, indent=2))
        return
    counts = (1, arguments.processes)
    runs: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    for _ in range(arguments.repeats):
        for count in counts:
            settings = {"devices": count, "sharding": arguments.sharding if count > 1 else "none"}
            runs[count].append(train(rows, batch_size=arguments.batch_size, **settings))
    speed = {n: statistics.median(run["tokens_per_second"] for run in found) for n, found in runs.items()}
    report = about | {
        "sharding": arguments.sharding,
        "tokens_per_second": speed,
        "ratio": round(speed[arguments.processes] / speed[1], 2),
        "runs": runs,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
