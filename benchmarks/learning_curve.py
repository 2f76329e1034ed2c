"""Learning curve: exact match on unseen templates by number of training rows, on one test for all points.

    python -m benchmarks.learning_curve [--rows-per-template 2 3 4 8] [--seeds 7 11] [--set KEY=VALUE ...]

Clones HEAD and trains and evaluates with the pipeline's own stages once for each point, with another
`split.max_train_rows_per_group`, which leaves the test as it is. Appends each point to `--results` and draws
all of them. On two cores a point takes as long as a run of the pipeline.

    python -m benchmarks.learning_curve --only-draw

Prints the table of the results; `docs/benchmarks.md` keeps it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.machine import machine
from stages.common.artifacts import read_json, reports, write_text
from stages.common.svg import draw_figure

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "learning-curve.svg"
RESULTS = Path(__file__).with_name("learning_curve.json")
REQUIRED = 0.82  # exact match that the default must reach


@dataclass(frozen=True, slots=True)
class Point:
    """One training and its exact match on the test, with a 95 % interval where it was computed.

    Attributes:
        settings: what differs from params.yaml of the measured commit.
    """

    rows_per_template: int
    settings: dict[str, Any]
    train_rows: int
    train_tokens: int
    updates: int
    exact_match: float
    low: float | None = None
    high: float | None = None

    @property
    def name(self) -> str:
        """Return the settings as text."""
        return ", ".join(f"{key.split('.')[1]} {value}" for key, value in self.settings.items())


def prepare(folder: Path) -> None:
    """Clone HEAD, and build the test and the base model's answers to it."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    for stage in ("fetch_base", "ask_base"):
        run(folder, "dvc", "repro", stage)


def write_params(folder: Path, params: Mapping[str, Any]) -> None:
    """Write the parameters of the clone."""
    write_text(folder / "params.yaml", yaml.safe_dump(dict(params), sort_keys=False))


def measure(folder: Path, rows_per_template: int, settings: Mapping[str, Any]) -> Point:
    """Train on part of the rows, evaluate, and return the point."""
    changes = {"split.max_train_rows_per_group": rows_per_template, **settings}
    params = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
    for key, value in changes.items():
        section, name = key.split(".")
        params[section][name] = value
    write_params(folder, params)
    for stage in ("split", "finetune", "export", "evaluate"):
        run(folder, f"stages.{stage}")
    trained = read_json(folder / reports("finetune") / "metrics.json")
    found = read_json(folder / reports("evaluate") / "metrics.json")["tuned"]["exact_match"]
    return Point(
        rows_per_template,
        dict(settings),
        trained["train_rows"],
        trained["train_tokens"],
        trained["steps"],
        found["value"],
        found["low"],
        found["high"],
    )


def run(folder: Path, module: str, *arguments: str) -> None:
    """Run `python -m MODULE ARGUMENTS` with the clone's code."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "DVC_NO_ANALYTICS": "1"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=folder, env=environment, check=True)


def format_table(points: Sequence[Point]) -> str:
    """Return the points as a Markdown table, the fewest tokens first."""
    lines = [
        "| rows a template | settings | rows | tokens | updates | exact match |",
        "|---:|---|---:|---:|---:|---|",
    ]
    for p in sorted(points, key=lambda p: (p.train_tokens, p.exact_match)):
        interval = "" if p.low is None or p.high is None else f" ({p.low:.3f} to {p.high:.3f})"
        lines.append(
            f"| {p.rows_per_template} | {p.name} | {p.train_rows:,} | {p.train_tokens:,} | {p.updates} "
            f"| {p.exact_match:.3f}{interval} |"
        )
    return "\n".join(lines) + "\n"


def draw(points: Sequence[Point], path: Path) -> None:
    """Draw exact match over training tokens, one line for each group of settings."""
    lines: dict[str, list[Point]] = defaultdict(list)
    for point in sorted(points, key=lambda point: point.train_tokens):
        lines[point.name].append(point)
    with draw_figure(path, 7, 4) as figure:
        axes = figure.subplots()
        for name, line in lines.items():
            tokens = [point.train_tokens / 1000 for point in line]
            axes.plot(tokens, [point.exact_match for point in line], marker="o", label=name)
        axes.axhline(REQUIRED, color="#888888", linestyle="--", linewidth=0.8)
        axes.set(xlabel="training tokens, thousands", ylabel="exact match, unseen templates")
        axes.set_title("How many rows the task needs")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)


def read_points(path: Path) -> list[Point]:
    """Return the points in a file; none where there is no file."""
    return [Point(**point) for point in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def main() -> None:
    """Measure the points, keep them, and print and draw all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows-per-template", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[7])
    parser.add_argument("--set", metavar="SECTION.KEY=VALUE", nargs="*", default=[], help="other parameters")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--only-draw", action="store_true", help="measure nothing")
    options = parser.parse_args()
    points = read_points(options.results)
    if not options.only_draw:
        print(json.dumps(machine()), file=sys.stderr)
        settings = {key: yaml.safe_load(value) for key, value in (word.split("=", 1) for word in options.set)}
        with tempfile.TemporaryDirectory(prefix="perennial-curve-") as temporary:
            folder = Path(temporary) / "checkout"
            prepare(folder)
            for count in options.rows_per_template:
                for seed in options.seeds:
                    points.append(measure(folder, count, {**settings, "finetune.seed": seed}))
                    shown = [asdict(point) for point in points]
                    write_text(options.results, json.dumps(shown, indent=1) + "\n")
    print(format_table(points))
    draw(points, options.picture)


if __name__ == "__main__":
    main()
