"""What each method gains over the adapter that it starts from: right answers, and preferences held out.

    # dpo and kto, on what users corrected:
    make demo && python -m benchmarks.methods --home .perennial/demo --methods dpo kto --rates 0.00005
    # dpo and kto, on errors of the model itself:
    make run && python -m benchmarks.methods --methods dpo kto --rates 0.00005 --own-errors 4000
    # grpo, against the adapter of lora that it starts from:
    make run && python -m benchmarks.methods --methods grpo --rates 0.0001 --rows 1200

Needs a checkout in which the pipeline has run. Where a retraining has run there, training starts from its
initial adapter, and the questions that feedback held out are asked beside the old test rows ("new"); else
from the checkout's own adapter. Trains once for each method and rate on the checkout's rows. Prints a table,
a line for the start first; each figure has its interval, its difference from the start with an interval, and
the p-value of a permutation test over groups, each paired by row:

- `old test`, `new`: the task's primary metric; `valid`: answers of the old test that can be used at all;
- `likelier`: share of the pairs held out whose better answer is the likelier one, and `margin`, by how many
  nats. Pairs are test and validation rows with a rejected answer.

With `--own-errors N` the start answers N training and validation rows at temperature 1 (on a CPU that the
engine `paged` runs on). A row with a wrong answer becomes a pair: its own answer, and that one. Of the groups
with errors 30 % are held out: they are measured, and leave the training rows. The others are learned.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as pq
import torch

from benchmarks.machine import machine
from benchmarks.own_errors import SEED, find_errors, share_out
from benchmarks.replay import copy_folder
from flows.common.checkout import override_params
from monitoring.feedback.rows import HELD_OUT
from stages.common.artifacts import artifacts, read_json, reports, write_json
from stages.common.chat.preferences import Pair, encode_pairs
from stages.common.errors import InputError
from stages.common.model.adapter import put_initial_adapter, read_initial_adapter
from stages.common.model.exported import GGUF
from stages.common.model.loading import load_tokenizer, load_tuned, pick_device
from stages.common.model.results import Metrics, Results, Sampling, compare, with_intervals
from stages.common.params.loading import load_params
from stages.common.records import read_rows, write_rows
from stages.common.sources.feedback import collect_feedback
from stages.common.task.kinds import read_task
from stages.common.task.protocol import Task
from stages.evaluate.preferences import compute_preference
from stages.finetune.batches import plan_batches
from stages.finetune.objectives.reference import order_by_row, score_batches
from stages.finetune.shared_prefix import lay_out

ROOT = Path(__file__).parents[1]
SETTINGS = {"ask_base.max_rows": None, "ask_base.min_test_rows": 1, "task.slices": ["traffic"]}
OLD, NEW = "old", "new"
BATCH = 8  # pairs scored at once
VALID = "valid_output"
MARGIN = "margin"  # in nats, and no share


@dataclass(frozen=True, slots=True)
class Part:
    """Metrics over the same rows, whose groups these are."""

    metrics: Metrics
    groups: Sequence[str]


@dataclass(slots=True)
class Table:
    """Estimates each model's metrics, and how they differ from those of the first one, the start."""

    sampling: Sampling
    start: Mapping[str, Part] = field(default_factory=dict)

    def estimate(self, parts: Mapping[str, Part]) -> dict[str, dict[str, Any]]:
        """Return each figure with its interval, and its difference from the start after the first call."""
        found: dict[str, dict[str, Any]] = {}
        for name, part in parts.items():
            estimates = with_intervals(part.metrics, part.groups, self.sampling)
            changes: Results = {}
            if name in self.start:
                changes = compare(self.start[name].metrics, part.metrics, part.groups, self.sampling)
            for metric, values in estimates.items():
                found[metric] = {**values, **({"difference": changes[metric]} if changes else {})}
        self.start = self.start or parts
        return found


def main(words: Sequence[str] | None = None) -> int:
    """Train and judge once for each method and rate; print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--home", type=Path, default=ROOT, help="where the pipeline has run")
    parser.add_argument("--methods", nargs="+", default=["lora", "dpo", "kto", "orpo"])
    parser.add_argument("--rates", type=float, nargs="+", help="default: that of params.yaml")
    parser.add_argument("--rows", type=int, help="training rows, at most; default: all")
    parser.add_argument("--own-errors", type=int, metavar="N", help="make pairs from answers to N rows")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further parameters")
    parser.add_argument("--out", type=Path, help="where to write the result, as JSON")
    options = parser.parse_args(words)
    home = options.home.resolve()
    rates = options.rates or [load_params(home / "params.yaml").finetune.learning_rate]
    found: dict[str, Any] = {"machine": machine(), "models": []}
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder)
        prepare(home, workspace, options.rows)
        override_params(workspace / "params.yaml", dict(map(read_setting, options.set)))
        params = load_params(workspace / "params.yaml")
        task = read_task(workspace)
        copy_folder(workspace / artifacts("initial_adapter"), workspace / artifacts("finetune"))
        run(workspace, "export")
        if options.own_errors:
            learn_own_errors(workspace, options.own_errors, task, params.ask_base.max_new_tokens)
        pairs = read_pairs(workspace)
        settings = params.evaluate
        table = Table(Sampling(settings.confidence, settings.resamples, settings.seed))
        start = table.estimate(judge(workspace, task) | measure(workspace, pairs))
        head = ("method", "rate", "rows", "s", *(f"{name} ({one['n']})" for name, one in start.items()))
        sys.stdout.write(f"{found['machine']}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}\n")
        tell(["start", "", "", ""], start)
        found["models"].append({"method": "start", "figures": start})
        for method, rate in product(options.methods, rates):
            override_params(
                workspace / "params.yaml", {"finetune.method": method, "finetune.learning_rate": rate}
            )
            run(workspace, "finetune")
            trained = read_json(workspace / reports("finetune") / "metrics.json")
            seconds = trained["throughput"]["seconds"]
            run(workspace, "export")
            figures = table.estimate(judge(workspace, task) | measure(workspace, pairs))
            tell([method, f"{rate:g}", f"{trained['train_rows']:,}", f"{seconds:.0f}"], figures)
            kept = {"method": method, "rate": rate, "rows": trained["train_rows"], "seconds": seconds}
            found["models"].append({**kept, "figures": figures, "training": trained.get("figures")})
            if options.out:
                write_json(options.out, found)
    return 0


def read_setting(text: str) -> tuple[str, Any]:
    """Return key and value of `KEY=VALUE`."""
    import yaml

    key, _, value = text.partition("=")
    return key, yaml.safe_load(value)


def prepare(home: Path, workspace: Path, max_rows: int | None) -> None:
    """Fill a workspace with the checkout's rows, base model and adapter.

    Args:
        max_rows: of the training, drawn at random; None for all.

    Raises:
        InputError: the pipeline has not run there.
    """
    if not (home / reports("finetune") / "metrics.json").is_file():
        raise InputError(f"{home} has no trained model", "run make run, or make demo and --home")
    for stage in ("fetch_base", "curate", "split"):
        copy_folder(home / artifacts(stage), workspace / artifacts(stage))
    copy_folder(home / reports("fetch_base"), workspace / reports("fetch_base"))
    shutil.copyfile(home / "params.yaml", workspace / "params.yaml")
    override_params(workspace / "params.yaml", SETTINGS)
    initial = read_initial_adapter(home / artifacts("initial_adapter"))
    if initial:
        copy_folder(home / artifacts("initial_adapter"), workspace / artifacts("initial_adapter"))
    else:
        sha256 = str(read_json(home / reports("fetch_base") / "metrics.json").get("sha256"))
        target = workspace / artifacts("initial_adapter")
        put_initial_adapter(home / artifacts("finetune"), "benchmark", sha256, target)
    prompt = load_params(home / "params.yaml").task.system_prompt
    # As the pipeline would take them in, had they not been held out.
    held_out = collect_feedback(home / HELD_OUT, prompt, "stop").rows
    split = workspace / artifacts("split")
    train = list(read_rows(split / "train.parquet"))
    if max_rows is not None and len(train) > max_rows:
        write_rows(split / "train.parquet", Random(SEED).sample(train, max_rows))
    asked = {OLD: read_rows(split / "test.parquet"), NEW: held_out}
    marked = [
        replace(row, tags={**row.tags, "traffic": kind}) for kind, rows in asked.items() for row in rows
    ]
    write_rows(split / "test.parquet", marked)
    run(workspace, "ask_base")


def learn_own_errors(workspace: Path, count: int, task: Task, max_new_tokens: int) -> None:
    """Make pairs of what the exported start answers wrong: some to learn, and others to measure on."""
    split = workspace / artifacts("split")
    train, validation = (read_rows(split / f"{side}.parquet") for side in ("train", "validation"))
    base, gguf = workspace / artifacts("fetch_base"), workspace / artifacts("export") / GGUF
    errors = find_errors(base, gguf, [*train, *validation], count, task, max_new_tokens)
    learned, held_out = share_out(errors)
    apart = {row.group for row in held_out}
    pairs = {row.id: row for row in learned}
    kept = [pairs.pop(row.id, row) for row in train if row.group not in apart]
    write_rows(split / "train.parquet", [*kept, *pairs.values()])  # behind: the learned validation rows
    known = {row.id for row in (*held_out, *learned)}
    write_rows(split / "validation.parquet", [*(row for row in validation if row.id not in known), *held_out])


def read_pairs(workspace: Path) -> list[Pair]:
    """Return the pairs that no training learns."""
    split = workspace / artifacts("split")
    sides = (read_rows(split / f"{side}.parquet") for side in ("test", "validation"))
    tokenizer = load_tokenizer(workspace / artifacts("fetch_base"))
    return list(encode_pairs(tokenizer, [row for rows in sides for row in rows if row.rejected])[0])


def judge(workspace: Path, task: Task) -> dict[str, Part]:
    """Evaluate the model in the workspace; return its metrics on each kind of traffic."""
    run(workspace, "evaluate")
    path = workspace / artifacts("evaluate") / "predictions.parquet"
    answers = {line["id"]: line["tuned"] for line in pq.read_table(path, columns=["id", "tuned"]).to_pylist()}
    asked = [row for row in read_rows(workspace / artifacts("split") / "test.parquet") if row.id in answers]
    found = {}
    for kind, name in ((OLD, f"{OLD} test"), (NEW, f"{NEW}, held out")):
        rows = [row for row in asked if row.tags["traffic"] == kind]
        if rows:
            scored = task.score([answers[row.id] for row in rows], [row.answer for row in rows])
            metrics = {name: scored[task.primary].as_share()}
            if kind == OLD and VALID in scored:
                metrics["valid"] = scored[VALID]
            found[kind] = Part(metrics, [row.group for row in rows])
    return found


def measure(workspace: Path, pairs: Sequence[Pair]) -> dict[str, Part]:
    """Return how much likelier the model in the workspace finds the better answer of pairs."""
    if not pairs:
        return {}
    base = workspace / artifacts("fetch_base")
    pad = load_tokenizer(base).pad_token_id
    model = load_tuned(base, workspace / artifacts("finetune"), torch.float32, pick_device())
    batches = plan_batches([len(pair.chosen.input_ids) for pair in pairs], BATCH, 1, 0)
    scores = score_batches(
        model,
        batches,
        lambda rows: [one for row in rows for one in (pairs[row].chosen, pairs[row].rejected)],
        lambda sequences: lay_out(sequences, pad, share_prefix=False),
    )
    each = order_by_row(batches, [[a - b for a, b in zip(s[::2], s[1::2], strict=True)] for s in scores])
    metrics = compute_preference(each)
    named = {"likelier": metrics["accuracy"], MARGIN: metrics[MARGIN]}
    return {"pairs": Part(named, [pair.row.group for pair in pairs])}


def run(workspace: Path, stage: str) -> None:
    """Run one stage in the workspace with this checkout's code.

    Raises:
        InputError: it fails, with what it wrote.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", f"stages.{stage}"],
        cwd=workspace,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        raise InputError(f"stage {stage} failed:\n{done.stderr[-4000:]}", "see above")


def tell(cells: Sequence[str], figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a line of the table."""
    line = [*cells, *(format_figure(name, figure) for name, figure in figures.items())]
    sys.stdout.write(f"| {' | '.join(line)} |\n")
    sys.stdout.flush()


def format_figure(name: str, figure: Mapping[str, Any]) -> str:
    """Return a figure with its interval, and its difference from the start with interval and p-value."""
    scale, unit = (1, "") if name == MARGIN else (100, " %")
    value, low, high = (scale * figure[key] for key in ("value", "low", "high"))
    shown = f"{value:.1f}{unit} ({low:.1f} to {high:.1f})"
    if change := figure.get("difference"):
        by, low, high = (scale * change[key] for key in ("value", "low", "high"))
        shown += f"; {by:+.1f} ({low:+.1f} to {high:+.1f}), p {change['p_value']:.3f}"
    return shown


if __name__ == "__main__":
    sys.exit(main())
