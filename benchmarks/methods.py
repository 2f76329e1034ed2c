"""What each method gains over the adapter that it starts from: right answers, and preferences held out.

    make demo && python -m benchmarks.methods --home .perennial/demo --methods lora dpo kto --rates 0.00005
    make run && python -m benchmarks.methods --methods lora orpo

Needs a checkout in which the pipeline has run. Where a retraining has run there, training starts from its
initial adapter, and the questions that feedback held out are asked beside the old test rows ("new"); else
from the checkout's own adapter. Trains once for each method and rate on the checkout's rows. Of the pairs
that were held out, the share is shown whose better answer is the likelier one; it is measured alike for all.
Prints a table, a line for the start first.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.replay import copy_folder, format_share
from flows.common.checkout import override_params
from monitoring.feedback.rows import HELD_OUT
from stages.common.artifacts import artifacts, read_json, reports
from stages.common.chat.preferences import encode_pairs
from stages.common.errors import InputError
from stages.common.model.adapter import put_initial_adapter, read_initial_adapter
from stages.common.model.loading import load_tokenizer, load_tuned, pick_device
from stages.common.params.loading import load_params
from stages.common.records import Row, read_rows, write_rows
from stages.common.sources.feedback import collect_feedback
from stages.finetune.batches import plan_batches
from stages.finetune.objectives.reference import score_batches
from stages.finetune.shared_prefix import lay_out

ROOT = Path(__file__).parents[1]
SETTINGS = {"ask_base.max_rows": None, "ask_base.min_test_rows": 1, "task.slices": ["traffic"]}
OLD, NEW = "old", "new"
BATCH = 8  # pairs scored at once


def main(words: Sequence[str] | None = None) -> int:
    """Train and judge once for each method and rate; print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__)
    parser.add_argument("--home", type=Path, default=ROOT, help="where the pipeline has run")
    parser.add_argument("--methods", nargs="+", default=["lora", "dpo", "kto", "orpo"])
    parser.add_argument("--rates", type=float, nargs="+", help="default: that of params.yaml")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further parameters")
    options = parser.parse_args(words)
    home = options.home.resolve()
    rates = options.rates or [load_params(home / "params.yaml").finetune.learning_rate]
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder)
        pairs = prepare(home, workspace)
        override_params(workspace / "params.yaml", dict(map(read_setting, options.set)))
        head = ("method", "rate", "rows", "s", f"{OLD} test", f"{NEW}, held out", f"likelier of {len(pairs)}")
        sys.stdout.write(f"{machine()}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}\n")
        copy_folder(workspace / artifacts("initial_adapter"), workspace / artifacts("finetune"))
        tell("start", "", "", "", judge(workspace), measure(workspace, pairs))
        for method, rate in product(options.methods, rates):
            override_params(
                workspace / "params.yaml", {"finetune.method": method, "finetune.learning_rate": rate}
            )
            run(workspace, "finetune")
            trained = read_json(workspace / reports("finetune") / "metrics.json")
            seconds = f"{trained['throughput']['seconds']:.0f}"
            rows = f"{trained['train_rows']:,}"
            tell(method, f"{rate:g}", rows, seconds, judge(workspace), measure(workspace, pairs))
    return 0


def read_setting(text: str) -> tuple[str, Any]:
    """Return key and value of `KEY=VALUE`."""
    import yaml

    key, _, value = text.partition("=")
    return key, yaml.safe_load(value)


def prepare(home: Path, workspace: Path) -> list[Row]:
    """Fill a workspace with the checkout's rows, base model and adapter; return the pairs held out.

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
    test = workspace / artifacts("split") / "test.parquet"
    asked = {OLD: read_rows(test), NEW: held_out}
    marked = [
        replace(row, tags={**row.tags, "traffic": kind}) for kind, rows in asked.items() for row in rows
    ]
    write_rows(test, marked)
    run(workspace, "ask_base")
    validation = read_rows(workspace / artifacts("split") / "validation.parquet")
    return [row for row in (*marked, *validation) if row.rejected]


def judge(workspace: Path) -> Mapping[str, Mapping[str, float]]:
    """Evaluate the model in the workspace; return the share of right answers of each kind of traffic."""
    run(workspace, "export")
    run(workspace, "evaluate")
    found: dict[str, Any] = read_json(workspace / reports("evaluate") / "metrics.json")["slices"]["traffic"]
    return found


def measure(workspace: Path, pairs: Sequence[Row]) -> float | None:
    """Return the share of pairs whose better answer is the likelier one to the model in the workspace."""
    if not pairs:
        return None
    base = workspace / artifacts("fetch_base")
    tokenizer = load_tokenizer(base)
    encoded = encode_pairs(tokenizer, pairs)[0]
    model = load_tuned(base, workspace / artifacts("finetune"), torch.float32, pick_device())
    batches = plan_batches([len(pair.chosen.input_ids) for pair in encoded], BATCH, 1, 0)
    scores = score_batches(
        model,
        batches,
        lambda rows: [one for row in rows for one in (encoded[row].chosen, encoded[row].rejected)],
        lambda sequences: lay_out(sequences, tokenizer.pad_token_id, share_prefix=False),
    )
    each = [score for batch in scores for score in batch]
    return sum(map(float.__gt__, each[::2], each[1::2])) / len(encoded)


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


def tell(
    method: str,
    rate: str,
    rows: str,
    seconds: str,
    right: Mapping[str, Mapping[str, float]],
    likelier: float | None,
) -> None:
    """Print a line of the table."""
    answers = [
        f"{format_share(right[kind])} of {right[kind]['n']}" if kind in right else "-" for kind in (OLD, NEW)
    ]
    cells = [method, rate, rows, seconds, *answers, "-" if likelier is None else f"{100 * likelier:.1f} %"]
    sys.stdout.write(f"| {' | '.join(cells)} |\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
