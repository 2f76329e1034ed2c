"""Training speed: `stages.finetune` against trl and LLaMA-Factory, at equal loss, and the machine's limit.

    python -m benchmarks.training [--rows 120] [--batch-size N] [--repeats 3] [--minutes 60]
        [--dtypes bfloat16 float32] [--llamafactory] [--tiny] [--out training.json]

Needs `artifacts/fetch_base` and `artifacts/split` (`dvc repro split`); --tiny makes a tiny model and rows.
All train the same LoRA once over the same rows, in turns, each in a process of its own. `trl defaults` is
`SFTTrainer` as it comes. The other settings of the peers have the batches, rate and schedule of `params.yaml`
(or batches of --batch-size) and the number format that is measured; the first turn tries all of them, later
turns have those of the fastest of each peer whose loss on held-out rows is at most 1 % from ours.
--llamafactory installs LLaMA-Factory into a temporary environment, as its versions are others than ours; if
that fails, the result says why.

Tokens are those of the rows, without padding; the time is that of the whole call of `train()`, including its
first, slow step. The share is that of the speed of plain matrix products, measured before the first step of
the same process. Prints the JSON object and a table; `docs/benchmarks.md` keeps the results.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.training_peers import (
    LLAMA_FACTORY,
    SETTINGS,
    Figures,
    Inputs,
    NotInstalled,
    make_figures,
    make_llamafactory,
    run_llamafactory,
    run_trl,
)
from stages.common.artifacts import artifacts
from stages.common.chat.template import Encoded, encode_example
from stages.common.logs import set_quiet_environment
from stages.common.model.loading import load_tokenizer
from stages.common.params.loading import load_params
from stages.common.records import Row, read_rows
from stages.finetune.recipe import Recipe

OURS, DEFAULTS = "ours", "trl defaults"
VALIDATION_ROWS = 48
EQUAL_LOSS = 0.01
OVER_DEFAULTS, OVER_BEST = 5.0, 1.8
SHARES = {"bfloat16": 0.4, "float32": 0.6}
LIMIT_S = 1800.0  # of one training


def run_ours(inputs: Inputs) -> Figures:
    """Train with the stage's own code."""
    from stages.finetune.adapter import build_model
    from stages.finetune.objectives.answers import Answers
    from stages.finetune.trainer import train

    model = build_model(inputs.base, inputs.recipe)
    with tempfile.TemporaryDirectory() as folder:
        trained = train(
            model,
            Answers(inputs.rows),
            inputs.validation,
            inputs.pad_id,
            inputs.recipe,
            Path(folder),
            checkpoint_every_steps=1_000_000,
        )
    assert trained.validation_loss is not None
    cost = trained.cost.to_metrics()
    return {
        **make_figures(inputs, trained.seconds, trained.validation_loss),
        "product_share": cost["product_share"],
        "product_limit_gflops": cost["product_limit_gflops"],
    }


def read_inputs(rows: int, dtype: str, batch_size: int | None = None) -> Inputs:
    """Return rows of the checkout's split, drawn at random, with its base model and recipe."""
    params = load_params().finetune
    recipe = Recipe(**params.model_dump(include=set(Recipe.__dataclass_fields__)))
    recipe = replace(recipe, dtype=dtype, epochs=1, batch_size=batch_size or recipe.batch_size)
    base = artifacts("fetch_base")
    tokenizer = load_tokenizer(base)

    def draw(name: str, count: int) -> list[Encoded]:
        every: Sequence[Row] = read_rows(artifacts("split") / f"{name}.parquet")
        chosen = random.Random(recipe.seed).sample(list(every), min(count, len(every)))
        return [encode_example(tokenizer, row.messages, row.tools) for row in chosen]

    return Inputs(
        base, tokenizer.pad_token_id, draw("train", rows), draw("validation", VALIDATION_ROWS), recipe
    )


def make_tiny_inputs(folder: Path, dtype: str) -> Inputs:
    """Return a tiny random model and random rows."""
    from benchmarks.gpu.models import make_config, make_model, make_recipe, make_rows, make_tokenizer

    if not (folder / "config.json").exists():
        make_model(make_config("llama-8b", tiny=True), "float32", "cpu").save_pretrained(folder)
        make_tokenizer(512).save_pretrained(folder)
    rows = make_rows(1500, 512, 64)
    return Inputs(folder, 1, rows[8:], rows[:8], make_recipe(dtype=dtype, batch_size=4))


def measure_one(who: str, inputs: Inputs, python: str | None) -> Figures:
    """Train as one of the contestants."""
    if who == OURS:
        return run_ours(inputs)
    if who == DEFAULTS:
        return run_trl(inputs, None)
    if who in LLAMA_FACTORY:
        assert python is not None
        return run_llamafactory(inputs, LLAMA_FACTORY[who], python)
    return run_trl(inputs, SETTINGS[who])


def run_apart(who: str, dtype: str, options: argparse.Namespace, python: str | None) -> Figures | str:
    """Train in a process of its own; return its figures, or why there are none."""
    command = [sys.executable, "-m", "benchmarks.training", "--only", who, "--dtypes", dtype]
    command += ["--rows", str(options.rows), "--folder", str(options.folder)]
    command += ["--tiny"] if options.tiny else []
    command += ["--batch-size", str(options.batch_size)] if options.batch_size else []
    command += ["--python", python] if python else []
    started = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"not done after {LIMIT_S:.0f} s"
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {done.returncode}"
    found: Figures = json.loads(done.stdout.splitlines()[-1])
    print(f"{dtype}, {who}: {found} in {time.monotonic() - started:.0f} s", file=sys.stderr)
    return found


def choose_best(runs: Mapping[str, Sequence[Figures]], names: Sequence[str]) -> str | None:
    """Return the fastest of these contestants whose loss is that of ours; of none, the fastest of all."""
    measured = [name for name in names if runs.get(name)]
    equal = [name for name in measured if is_equal(runs, name)]
    return max(equal or measured, key=lambda name: median(runs[name], "tokens_per_second"), default=None)


def is_equal(runs: Mapping[str, Sequence[Figures]], name: str) -> bool:
    """Return whether a contestant's loss is at most 1 % from ours."""
    return abs(median(runs[name], "loss") / median(runs[OURS], "loss") - 1) <= EQUAL_LOSS


def median(runs: Sequence[Figures], key: str) -> float:
    """Return the median of a figure."""
    return statistics.median(run[key] for run in runs)


def measure(dtype: str, options: argparse.Namespace, python: str | None, until: float) -> dict[str, Any]:
    """Let all contestants train in turns in one number format, and return what they reached."""
    peers = {"trl": list(SETTINGS), "LLaMA-Factory": list(LLAMA_FACTORY) if python else []}
    turn = [OURS, DEFAULTS, *peers["trl"], *peers["LLaMA-Factory"]]
    runs: dict[str, list[Figures]] = {name: [] for name in turn}
    failed: dict[str, str] = {}
    for number in range(options.repeats):
        if number == 1:  # the settings have been found
            best = [choose_best(runs, names) for names in peers.values()]
            turn = [OURS, DEFAULTS, *(name for name in best if name)]
        for name in turn:
            if time.monotonic() > until:
                failed.setdefault("time", f"--minutes were over in turn {number + 1}, before {name}")
                break
            found = run_apart(name, dtype, options, python)
            if isinstance(found, str):
                failed[name] = found
            else:
                runs[name].append(found)
    return {"runs": {name: some for name, some in runs.items() if some}, "failed": failed} | (
        summarize(dtype, runs, peers) if runs[OURS] else {}
    )


def summarize(
    dtype: str, runs: Mapping[str, Sequence[Figures]], peers: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Return medians, the best settings of each peer, and what was to be reached."""
    speed = {name: median(some, "tokens_per_second") for name, some in runs.items() if some}
    best = {peer: name for peer, names in peers.items() if (name := choose_best(runs, names))}
    share = median(runs[OURS], "product_share")
    goals = [(f"share of matrix products, {dtype}", round(share, 3), SHARES[dtype])]
    if DEFAULTS in speed:
        goals.append(("tokens/s against trl's defaults", speed[OURS] / speed[DEFAULTS], OVER_DEFAULTS))
    for peer, name in best.items():
        note = "" if is_equal(runs, name) else ", whose loss differs by more than 1 %"
        goals.append(
            (f"tokens/s against the best of {peer} ({name}{note})", speed[OURS] / speed[name], OVER_BEST)
        )
    return {
        "tokens_per_second": speed,
        "loss": {name: median(some, "loss") for name, some in runs.items() if some},
        "best": best,
        "product_share": share,
        "goals": [
            {"what": what, "value": round(value, 3), "goal": goal, "reached": value >= goal}
            for what, value, goal in goals
        ],
    }


def format_table(dtypes: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = ["| | tokens/s | ours is so many times as fast | loss | peak, MiB |", "|---|---:|---:|---:|---:|"]
    for dtype, found in dtypes.items():
        for name, some in found["runs"].items():
            speeds = ", ".join(f"{run['tokens_per_second']:,.0f}" for run in some)
            ratio = (
                found["tokens_per_second"][OURS] / found["tokens_per_second"][name]
                if "best" in found
                else 0.0
            )
            lines.append(
                f"| {dtype}, {name} | {median(some, 'tokens_per_second'):,.0f} ({speeds}) | {ratio:.2f} | "
                f"{median(some, 'loss'):.4f} | {median(some, 'peak_rss_mib'):,.0f} |"
            )
        lines += [
            f"| {dtype}, {name} | – | – | – | {reason[:160]} |" for name, reason in found["failed"].items()
        ]
    lines += ["", "| goal | reached | asked | |", "|---|---:|---:|---|"]
    for found in dtypes.values():
        lines += [
            f"| {goal['what']} | {goal['value']} | ≥ {goal['goal']} | "
            f"{'yes' if goal['reached'] else '**no**'} |"
            for goal in found.get("goals", ())
        ]
    return "\n".join(lines)


def main() -> None:
    """Let all train in turns, and print medians and ratios."""
    set_quiet_environment()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=120)
    parser.add_argument(
        "--batch-size", type=int, help="of ours and of the peers' settings; that of params.yaml"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=60.0, help="after which no training is begun")
    parser.add_argument("--dtypes", nargs="+", choices=sorted(SHARES), default=sorted(SHARES))
    parser.add_argument("--llamafactory", action="store_true", help="install it into a temporary environment")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    parser.add_argument("--only", help="one training of one contestant, in this process")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--python", help="a python that has LLaMA-Factory already")
    options = parser.parse_args()
    if options.only:
        dtype = options.dtypes[0]
        inputs = (
            make_tiny_inputs(options.folder, dtype)
            if options.tiny
            else read_inputs(options.rows, dtype, options.batch_size)
        )
        print(json.dumps(measure_one(options.only, inputs, options.python)))
        return

    until = time.monotonic() + 60 * options.minutes
    report: dict[str, Any] = {"machine": machine(), "rows": options.rows}
    with tempfile.TemporaryDirectory() as name:
        options.folder = Path(name)
        python = options.python
        if options.llamafactory and not python:
            try:
                python = make_llamafactory(options.folder / "llamafactory")
            except NotInstalled as error:
                report["LLaMA-Factory"] = str(error)
        if not python:
            report.setdefault("LLaMA-Factory", "not measured: --llamafactory was not given")
        report["dtypes"] = {}
        for number, dtype in enumerate(options.dtypes):
            # What is left of the time, for each number format as much.
            share = (until - time.monotonic()) / (len(options.dtypes) - number)
            report["dtypes"][dtype] = measure(dtype, options, python, time.monotonic() + share)
    text = json.dumps(report, indent=2)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    print(format_table(report["dtypes"]))


if __name__ == "__main__":
    main()
