"""Learning, forgetting and cost of a retraining, by `finetune.replay_share` and learning rate.

Needs a checkout in which a retraining has run, and uses its old and new rows, its initial adapter, and the
labelled questions that were held out. Trains once for each share and rate from that adapter, and evaluates
each model on the old test rows and on the held-out ones.

Run: `make demo`, then `python -m benchmarks.replay` (about a quarter of an hour on two cores)
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from flows.common.checkout import make_checkout, override_params, run_python
from flows.demo.__main__ import CHECKOUT
from monitoring.feedback.rows import HELD_OUT
from stages.common.artifacts import artifacts, read_json, reports
from stages.common.errors import InputError
from stages.common.model.adapter import read_initial_adapter
from stages.common.params.loading import load_params
from stages.common.records import read_rows, write_rows
from stages.common.sources.feedback import collect_feedback

SHARES = (1.0, 0.25, 0.0)
SETTINGS = {"ask_base.max_rows": None, "ask_base.min_test_rows": 1, "task.slices": ["traffic"]}
OLD, NEW = "old", "new"


def main(words: Sequence[str] | None = None) -> int:
    """Train and judge once for each share; print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replay", description=__doc__)
    parser.add_argument("--home", type=Path, default=CHECKOUT, help="where a retraining has been")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--rates", type=float, nargs="+", help="default: that of params.yaml")
    options = parser.parse_args(words)
    home = options.home.resolve()
    workspace = prepared(home, home.with_name(f"{home.name}-replay"))
    rates = options.rates or [load_params(home / "params.yaml").finetune.learning_rate]
    head = ("replay_share", "learning rate", "rows", "training, s", "old test", "new, held out")
    sys.stdout.write(f"{machine()}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}\n")
    copy_folder(home / artifacts("initial_adapter"), workspace / artifacts("finetune"))
    tell("before", "", "", "", judged(workspace))
    for share, rate in product(options.shares, rates):
        changes = {"finetune.replay_share": share, "finetune.learning_rate": rate}
        override_params(workspace / "params.yaml", changes)
        run(workspace, "finetune")
        trained = read_json(workspace / reports("finetune") / "metrics.json")
        seconds = f"{trained['throughput']['seconds']:.0f}"
        tell(f"{share:g}", f"{rate:g}", f"{trained['train_rows']:,}", seconds, judged(workspace))
    return 0


def prepared(home: Path, folder: Path) -> Path:
    """Make a workspace with the checkout's rows and initial adapter, and a test of its old and held-out rows.

    Raises:
        InputError: no retraining has run there.
    """
    start = read_initial_adapter(home / artifacts("initial_adapter"))
    if start is None or not start.read_trained_ids() or not (home / HELD_OUT).is_file():
        raise InputError(f"{home} has seen no retraining", "run make demo")
    make_checkout(home, folder, SETTINGS)
    for stage in ("fetch_base", "curate", "split", "initial_adapter"):
        copy_folder(home / artifacts(stage), folder / artifacts(stage))
    copy_folder(home / reports("fetch_base"), folder / reports("fetch_base"))
    prompt = load_params(home / "params.yaml").task.system_prompt
    test = artifacts("split") / "test.parquet"
    # As the pipeline would take them in, had they not been held out.
    held_out = collect_feedback(home / HELD_OUT, prompt, "stop").rows
    asked = {OLD: read_rows(home / test), NEW: held_out}
    marked = [
        replace(row, tags={**row.tags, "traffic": kind}) for kind, rows in asked.items() for row in rows
    ]
    write_rows(folder / test, marked)
    run(folder, "ask_base")
    return folder


def judged(workspace: Path) -> dict[str, Any]:
    """Evaluate the model in the workspace; return the share of right answers of each kind."""
    run(workspace, "export")
    run(workspace, "evaluate")
    slices = read_json(workspace / reports("evaluate") / "metrics.json")["slices"]
    found: dict[str, Any] = slices["traffic"]
    return found


def run(workspace: Path, stage: str) -> None:
    """Run one stage in the workspace."""
    log = workspace / ".perennial" / "logs" / "replay.log"
    run_python(workspace, "-m", f"stages.{stage}", log=log, environment={"HF_HUB_OFFLINE": "1"})


def tell(share: str, rate: str, rows: str, seconds: str, right: dict[str, Any]) -> None:
    """Print a line of the table."""
    cells = [f"{format_share(right[kind])} of {right[kind]['n']}" for kind in (OLD, NEW)]
    sys.stdout.write(f"| {' | '.join([share, rate, rows, seconds, *cells])} |\n")
    sys.stdout.flush()


def format_share(figures: Mapping[str, float]) -> str:
    """Return a share with its interval."""
    value, low, high = (100 * figures[key] for key in ("value", "low", "high"))
    return f"{value:.1f} % ({low:.1f} to {high:.1f})"


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder, replacing the one there."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


if __name__ == "__main__":
    sys.exit(main())
