"""Run `init` and the whole pipeline on data of other shapes without manual edits: times and metrics.

    python -m benchmarks.own_data [--tldr CLONE] [--llama-factory CLONE] [--folder FOLDER] [--only NAME ...]

Clones this repository's HEAD into FOLDER (default: a new temporary folder) and runs `make init` and
`make run` there for one data set after the other, with the Python that runs this. Prints a table in Markdown;
`docs/benchmarks.md` keeps it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks.machine import machine
from benchmarks.own_data_sets import DataSet, write_data_sets
from benchmarks.pipeline import clone, make_environment, measured

HEADER = "| data | rows | task | init, s | run, min | test rows | metric | base | tuned |"


def main() -> None:
    """Run all data sets and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tldr", type=Path, help="a git clone of tldr-pages/tldr")
    parser.add_argument("--llama-factory", type=Path, help="a git clone of hiyouga/LLaMA-Factory")
    parser.add_argument("--folder", type=Path, help="where to clone to; kept afterwards")
    parser.add_argument(
        "--only", nargs="+", default=[], help="anfragen, labels, many, openai, commands, alpaca"
    )
    arguments = parser.parse_args()
    base = arguments.folder or Path(tempfile.mkdtemp(prefix="perennial-own-data-"))
    base.mkdir(parents=True, exist_ok=True)
    home = base / "home"
    if not home.exists():
        clone(home)
    sets = write_data_sets(base / "sets", arguments.tldr, arguments.llama_factory, arguments.only)
    rows = []
    for data in sets:
        rows.append(format_row(data, run_data_set(home, data, base)))
        sys.stderr.write(rows[-1] + "\n")
    print(json.dumps(machine()))
    print("\n".join([HEADER, "|" + "---|" * (HEADER.count("|") - 1), *rows]))


def run_data_set(home: Path, data: DataSet, base: Path) -> dict[str, Any]:
    """Set up the clone for a data set and run the pipeline; return times and evidence."""
    subprocess.run(["git", "checkout", "--quiet", "params.yaml"], cwd=home, check=True)
    name = data.path.name.split(".")[0]
    environment = make_environment(home)
    init = [sys.executable, "-m", "flows.init", str(data.path), "--license", data.license]
    found: dict[str, Any] = {"init": measured(init, home, base / f"{name}-init.log", **environment)}
    if found["init"]["exit"] == 0:
        run = [sys.executable, "-m", "flows.training"]
        found["run"] = measured(run, home, base / f"{name}-run.log", **environment)
        found["task"] = yaml.safe_load((home / "params.yaml").read_text(encoding="utf-8"))["task"]["kind"]
        if found["run"]["exit"] == 0:
            found["evaluate"] = json.loads(
                (home / "reports/evaluate/metrics.json").read_text(encoding="utf-8")
            )
    return found


def format_row(data: DataSet, found: Mapping[str, Any]) -> str:
    """Return the table row of a data set; a failed step is named."""
    for step in ("init", "run"):
        if found[step]["exit"] != 0:
            return f"| {data.name} | {data.rows:,} | {step} ended with exit code {found[step]['exit']} |"
    evidence = found["evaluate"]
    metric = evidence["primary"]
    base, tuned = (format_figure(evidence[side][metric]) for side in ("base", "tuned"))
    cells = (
        data.name,
        f"{data.rows:,}",
        found["task"],
        f"{found['init']['seconds']:.0f}",
        f"{found['run']['seconds'] / 60:.1f}",
        f"{evidence['rows']:,}",
        metric.replace("_", " "),
        base,
        tuned,
    )
    return f"| {' | '.join(cells)} |"


def format_figure(figure: Any) -> str:
    """Return a number with its interval, if it has one."""
    if not isinstance(figure, Mapping):
        return f"{figure:.3f}"
    low, high = figure.get("low"), figure.get("high")
    interval = f" ({low:.3f} to {high:.3f})" if low is not None and high is not None else ""
    return f"{figure['value']:.3f}{interval}"


if __name__ == "__main__":
    main()
