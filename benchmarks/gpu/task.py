"""The default task end to end on this machine: minutes of each stage, and the exact match.

    python -m benchmarks.gpu.task [--tiny] [--result FILE] [--keep FOLDER]

Runs the stages of `dvc.yaml` up to `evaluate` in turn, each as `python -m stages.NAME`, in a folder of its
own with the checkout's parameters; `model_card` describes a run that DVC has recorded, and there is none. The
seconds are written after each stage. --tiny: the same stages, with a tiny model and rows made here.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from benchmarks.gpu.models import ROOT, make_config, make_model, make_tokenizer
from benchmarks.gpu.part import CannotRun, Note, need_gpu, run_part
from stages.common.artifacts import read_json, write_lines

LAST = "evaluate"
NEEDED = {"great_expectations": "validate", "gguf": "export", "matplotlib": "finetune"}
# Of the tiny run, by section; its rows are questions of these parts, each with its thing as the answer.
TINY_SETTINGS: dict[str, dict[str, Any]] = {
    "task": {"label_key": "thing", "system_prompt": None, "slices": []},
    "fetch_base": {"origin": "folder", "name": "base", "revision": None, "sha256": None, "file": None},
    "validate": {"min_rows": 50},
    "check_bias": {"groups": {"thing": {"min_representation_ratio": None, "max_cramers_v": None}}},
    "split": {"min_train_rows": 20, "min_test_rows": 5},
    "ask_base": {"min_test_rows": 5, "max_new_tokens": 8},
    "finetune": {"max_length": 256, "rank": 4, "batch_size": 8, "learning_rate": 1e-4, "epochs": 1},
    "export": {"gguf": False},
    "evaluate": {"resamples": 100},
    "model_card": {"name": "things", "intended_use": "Name things.", "out_of_scope": "All else."},
}
THINGS = ("the lamp in the hall", "my heater", "a blue blind", "our old radio")
WISHES = ("is too loud", "went off yesterday", "should be on at noon", "needs a new part", "looks wrong")
HASTE = ("please hurry", "everybody is waiting", "no rush at all", "whenever there is time")


def list_stages() -> list[str]:
    """Return the stages of `dvc.yaml` in its order, up to the last one that needs no `dvc.lock`."""
    stages = list(yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"])
    return stages[: stages.index(LAST) + 1]


def measure(options: argparse.Namespace, note: Note) -> dict[str, Any]:
    """Run the stages, and return their seconds and what was reached."""
    need_gpu(options.tiny)
    stages = list_stages()
    if lacking := [
        f"{name} ({stage})" for name, stage in NEEDED.items() if not importlib.util.find_spec(name)
    ]:
        raise CannotRun(f"not installed here: {', '.join(lacking)}")
    place = nullcontext(str(options.keep)) if options.keep else tempfile.TemporaryDirectory()
    with place as name:
        folder = Path(name)
        lay_out(folder, options.tiny)
        seconds = dict[str, float]()
        for stage in stages:
            seconds[stage] = run_stage(folder, stage)
            note(summarise(folder, stages, seconds))
        return summarise(folder, stages, seconds)


def summarise(folder: Path, stages: Sequence[str], seconds: Mapping[str, float]) -> dict[str, Any]:
    """Return the times of the stages that have run, which have not, and what was reached."""
    return {
        "seconds": dict(seconds),
        "minutes": round(sum(seconds.values()) / 60, 2),
        "not_run": [stage for stage in stages if stage not in seconds],
        **read_result(folder, seconds),
    }


def lay_out(folder: Path, tiny: bool) -> None:
    """Prepare a folder in which the stages run."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "data", folder / "data", dirs_exist_ok=True)
    (folder / "artifacts" / "initial_adapter").mkdir(parents=True, exist_ok=True)
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    if tiny:
        for section, changes in TINY_SETTINGS.items():
            params[section].update(changes)
        params["collect"]["sources"] = [make_tiny_inputs(folder)]
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")


def make_tiny_inputs(folder: Path) -> dict[str, Any]:
    """Write a random model and rows; return the source of the rows."""
    base = folder / "base"
    make_model(make_config("llama-8b", tiny=True), "float32", "cpu").save_pretrained(base)
    make_tokenizer(512).save_pretrained(base)
    lines = [
        {"prompt": f"{thing} {wish}, {haste}", "completion": json.dumps({"thing": thing}), "thing": thing}
        for thing, wish, haste in product(THINGS, WISHES, HASTE)
    ]
    write_lines(folder / "data" / "rows.jsonl", (json.dumps(line) + "\n" for line in lines))
    columns = {"prompt_column": "prompt", "completion_column": "completion", "tag_columns": ["thing"]}
    return {"kind": "file", "path": "data/rows.jsonl", "license": "cc0-1.0", "origin": "human", **columns}


def run_stage(folder: Path, stage: str) -> float:
    """Run a stage; return its seconds.

    Raises:
        RuntimeError: it failed; the message has the end of its output.
    """
    started = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"stages.{stage}"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"stage {stage} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return round(time.monotonic() - started, 1)


def read_result(folder: Path, stages: Collection[str]) -> dict[str, Any]:
    """Return what these stages reported of the training, and of the answers; a kept folder may have more."""
    found = dict.fromkeys(("train_loss", "tokens_per_second", "exact_match"))
    if "finetune" in stages:
        report = read_json(folder / "reports" / "finetune" / "metrics.json")
        found["train_loss"] = report["train_loss"]
        found["tokens_per_second"] = report["throughput"]["tokens_per_second"]
    if LAST in stages:
        report = read_json(folder / "reports" / LAST / "metrics.json")
        found["exact_match"] = report["tuned"]["exact_match"]["value"]
    return found


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keep", type=Path, help="run in this folder, which may exist, and leave it")


if __name__ == "__main__":
    run_part(__doc__, measure, _add_arguments)
