"""What each `finetune.method` costs and reaches on the same rows: tokens/s, memory, seconds, metric, bytes.

    python -m benchmarks.method_costs [--rows 400] [--methods lora dora ...] [--rate full=0.00005] [--tiny]
        [--out methods.json]

Needs `artifacts/fetch_base`, `artifacts/curate` and `artifacts/split` (`dvc repro split`); --tiny makes a
tiny model and rows. Each method is the stage `finetune` itself, in a folder of its own and with the
parameters of the checkout, but for the method, its learning rate, and one point of validation, at the end.
Methods that need more than rows with answers (pairs, rewards, a teacher, labels) are left out.
Prints the table that `docs/how-to/methods.md` keeps, and writes a JSON object. `processor s` is the processor
time of the whole stage: with one thread (`OMP_NUM_THREADS=1`) other programs on the machine change it least.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml

from benchmarks.gpu.models import ROOT, make_tiny_split
from benchmarks.gpu.task import run_stage
from benchmarks.machine import machine
from stages.common.artifacts import artifacts, write_json
from stages.common.logs import set_quiet_environment
from stages.common.model.adapter import HEAD, OTHER_OBJECTIVES, PROMPT_METHODS, REPLACED_METHODS
from stages.common.params.finetune import Method
from stages.common.records import read_rows, write_rows

# Of weights themselves and of virtual tokens: what is usual elsewhere. Others have the rate of params.yaml.
WEIGHTS_RATE, TOKENS_RATE = 0.00005, 0.03
TINY_SETTINGS = {  # of a model of two blocks; `partial` trains one
    "batch_size": 4,
    "max_length": 256,
    "rank": 4,
    "trained_modules": 1,
    "checkpoint_every_steps": 100,
    "epochs": 1,
}
MIB = 1 << 20


def list_methods() -> list[str]:
    """Return the methods of params.yaml that learn answers and need nothing else."""
    return [method for method in get_args(Method) if method not in (*OTHER_OBJECTIVES, HEAD)]


def choose_rate(method: str, finetune: Mapping[str, Any]) -> float:
    """Return the learning rate of a method, as `docs/how-to/methods.md` has it."""
    if method in REPLACED_METHODS:
        return WEIGHTS_RATE
    if method in PROMPT_METHODS:
        return TOKENS_RATE
    rate = float(finetune["learning_rate"])
    return rate / math.sqrt(finetune["rank"]) if method == "rslora" else rate


def measure(method: str, rate: float | None, options: argparse.Namespace) -> dict[str, Any]:
    """Train with a method in a folder of its own, and return what it took and reached."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    finetune = params["finetune"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.tiny:
            finetune.update(TINY_SETTINGS)
            make_tiny_split(folder)
        else:
            lay_out(folder, options.rows)
        rate = rate or choose_rate(method, finetune)
        finetune.update(
            method=method,
            learning_rate=rate,
            warm_start_from=None,
            early_stopping=None,
            validate_every=1.0,
            validation_rows=options.validation_rows,
        )
        params["export"]["gguf"] = method not in PROMPT_METHODS  # which have no weights that it could hold
        (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run_stage(folder, "finetune")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = json.loads((folder / "reports/finetune/metrics.json").read_text(encoding="utf-8"))
        files = [path for path in (folder / "artifacts/finetune").rglob("*") if path.is_file()]
        took = found["throughput"]
        points = {name: value for name, value in found["validation_points"][-1].items() if name != "step"}
        return {
            "learning_rate": rate,
            "trained_parameters": found["trained_parameters"],
            "train_tokens": found["train_tokens"],
            "seconds": took["seconds"],
            "processor_seconds": round(
                after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1
            ),
            "tokens_per_second": took["tokens_per_second"],
            "peak_mib": took["peak_device_mib"] or took["peak_rss_mib"],
            "validation_loss": found["validation_loss"],
            "metrics": points,
            "adapter_bytes": sum(path.stat().st_size for path in files),
        }


def lay_out(folder: Path, rows: int) -> None:
    """Link the checkout's base model and task, and write a part of its rows."""
    for stage in ("fetch_base", "curate"):
        (folder / artifacts(stage)).parent.mkdir(parents=True, exist_ok=True)
        (folder / artifacts(stage)).symlink_to((ROOT / artifacts(stage)).resolve())
    split = folder / artifacts("split")
    split.mkdir()
    every = read_rows(ROOT / artifacts("split") / "train.parquet")
    chosen = random.Random(7).sample(range(len(every)), min(rows, len(every)))
    write_rows(split / "train.parquet", [every[number] for number in sorted(chosen)])
    (split / "validation.parquet").symlink_to((ROOT / artifacts("split") / "validation.parquet").resolve())


def format_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = [
        "| method | rate | trained weights | tokens/s | seconds | processor s | MiB | loss | metric | MB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|---:|",
    ]
    for method, one in found.items():
        if "failed" in one:
            lines.append(f"| `{method}` | – | – | – | – | – | – | – | {one['failed']} | – |")
            continue
        name, value = next((pair for pair in one["metrics"].items() if pair[0] != "loss"), ("loss", 0.0))
        lines.append(
            f"| `{method}` | {one['learning_rate']:.2g} | {one['trained_parameters']:,} | "
            f"{one['tokens_per_second']:,.0f} | {one['seconds']:,.0f} | "
            f"{one['processor_seconds']:,.0f} | {one['peak_mib']:,} | "
            f"{one['validation_loss']:.3f} | {name} {value:.3f} | {one['adapter_bytes'] / 1e6:,.1f} |"
        )
    return "\n".join(lines)


def read_rates(given: Sequence[str], known: Sequence[str]) -> dict[str, float]:
    """Return the rates of `METHOD=RATE`.

    Raises:
        ValueError: one is not of this form, or names no method.
    """
    rates = {}
    for pair in given:
        method, _, rate = pair.partition("=")
        if method not in known:
            raise ValueError(f"--rate {pair}: the methods are {', '.join(known)}")
        rates[method] = float(rate)
    return rates


def main() -> int:
    """Train with each method in turn, and print the table; return 1 if one of them failed."""
    set_quiet_environment()
    known = list_methods()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--validation-rows", type=int, default=48)
    parser.add_argument("--methods", nargs="+", choices=known, default=known)
    parser.add_argument("--rate", nargs="+", default=[], metavar="METHOD=RATE")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--out", type=Path, help="write the JSON object to this file")
    options = parser.parse_args()
    try:
        rates = read_rates(options.rate, known)
    except ValueError as error:
        parser.error(str(error))
    found: dict[str, dict[str, Any]] = {}
    for method in options.methods:
        try:
            found[method] = measure(method, rates.get(method), options)
        except RuntimeError as error:
            lines = str(error).strip().splitlines()[-2:]  # of an InputError: what, and the fix
            found[method] = {"failed": "; ".join(line.strip() for line in lines)}
        print(f"{method}: {found[method]}", file=sys.stderr)
        if options.out:
            write_json(options.out, {"machine": machine(), "rows": options.rows, "methods": found})
    print(format_table(found))
    return int(any("failed" in one for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
