"""What `two_hosts.sh` trains in two network namespaces, and how it compares with one process.

    python -m benchmarks.two_hosts prepare FOLDER [--rows 32] [--batch-size 8] [--method lora]
        [--sharding none]
    python -m benchmarks.two_hosts compare FOLDER --link JSON

Float32: in bfloat16 the order of sums would show. `compare` ends with 1 where the losses differ by more than
rounding.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
from pathlib import Path
from typing import Any

from benchmarks.devices import make_project
from benchmarks.machine import machine
from stages.common.artifacts import artifacts, read_json, reports
from stages.common.records import read_rows

HOSTS = ("first", "second")
ROUNDING = 1e-4  # relative, of a loss in float32


def prepare(folder: Path, rows: int, batch_size: int, **settings: Any) -> None:
    """Lay out a folder for each host, and one for the training in one process."""
    drawn = random.Random(7).sample(read_rows(artifacts("split") / "train.parquet"), rows)
    same = {"batch_size": batch_size, "dtype": "float32", "validate_every": None, "devices": 1}
    for host in HOSTS:
        make_project(folder / host, drawn, **same, **settings, launcher="torchrun")
    make_project(folder / "one", drawn, **same, **{**settings, "sharding": "none"})


def compare(folder: Path, link: dict[str, Any]) -> dict[str, Any]:
    """Return how far the losses of the two trainings are apart, and what they took.

    Args:
        link: the counters of one end of the cable, as `ip -s -j link show` has them.
    """
    # torchrun decides which host is rank 0; that one writes.
    (host,) = [host for host in HOSTS if (folder / host / reports("finetune") / "metrics.json").exists()]
    together, alone = (
        read_json(folder / name / reports("finetune") / "metrics.json") for name in (host, "one")
    )
    curves = [_read_losses(folder / name / reports("finetune") / "loss.csv") for name in (host, "one")]
    return {
        "machine": machine(),
        "method": together["method"],
        "sharded": together["sharded"],
        "trained_parameters": together["trained_parameters"],
        "updates": len(curves[1]),
        "losses": [curves[1][0], curves[1][-1]],
        "largest_difference": max(abs(a - b) / b for a, b in zip(*curves, strict=True)),
        "mb_sent": round(link["stats64"]["tx"]["bytes"] / 1e6, 1),
        "mb_received": round(link["stats64"]["rx"]["bytes"] / 1e6, 1),
        "tokens_per_second": {
            "two hosts": together["throughput"]["tokens_per_second"],
            "one process": alone["throughput"]["tokens_per_second"],
        },
        "processes": together["processes"],
    }


def _read_losses(path: Path) -> list[float]:
    with path.open(encoding="utf-8") as file:
        return [float(point["loss"]) for point in csv.DictReader(file)]


def main() -> None:
    """Prepare the trainings, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare")
    first.add_argument("folder", type=Path)
    first.add_argument("--rows", type=int, default=32)
    first.add_argument("--batch-size", type=int, default=8)
    first.add_argument("--method", default="lora")
    first.add_argument("--sharding", default="none")
    second = commands.add_parser("compare")
    second.add_argument("folder", type=Path)
    second.add_argument("--link", type=json.loads, required=True)
    arguments = vars(parser.parse_args())
    if arguments.pop("command") == "prepare":
        prepare(**arguments)
        return
    report = compare(arguments["folder"], arguments["link"][0])
    print(json.dumps(report, indent=2))
    if report["processes"] != len(HOSTS) or report["largest_difference"] > ROUNDING:
        sys.exit("two_hosts: the losses of two hosts are not those of one process")


if __name__ == "__main__":
    main()
