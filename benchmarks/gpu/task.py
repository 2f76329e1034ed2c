"""The default task end to end on this machine: minutes of each stage, and the exact match.

    python -m benchmarks.gpu.task [--tiny] [--result FILE] [--keep FOLDER]

Runs the stages of `dvc.yaml` in turn, each as `python -m stages.NAME`, in a folder of its own with
the checkout's parameters. --tiny: `finetune` alone, on a tiny model and rows made here.
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
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml

from benchmarks.gpu.models import ROOT, make_config, make_model, make_tokenizer
from benchmarks.gpu.part import CannotRun, need_gpu, run_part

NEEDED = {"great_expectations": "validate", "gguf": "export", "matplotlib": "finetune"}
TINY_SETTINGS = {
    "batch_size": 4,
    "max_length": 256,
    "rank": 4,
    "trained_modules": 1,
    "checkpoint_every_steps": 100,
    "epochs": 1,
}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the stages, and return their seconds and what was reached."""
    need_gpu(options.tiny)
    order = list(yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"])
    stages = ["finetune"] if options.tiny else order
    if lacking := [
        f"{name} ({stage})" for name, stage in NEEDED.items() if not importlib.util.find_spec(name)
    ]:
        raise CannotRun(f"not installed here: {', '.join(lacking)}")
    place = nullcontext(str(options.keep)) if options.keep else tempfile.TemporaryDirectory()
    with place as name:
        folder = Path(name)
        lay_out(folder, options.tiny)
        seconds = {stage: run_stage(folder, stage) for stage in stages}
        return {"seconds": seconds, "minutes": round(sum(seconds.values()) / 60, 2), **read_result(folder)}


def lay_out(folder: Path, tiny: bool) -> None:
    """Prepare a folder in which the stages run."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "data", folder / "data", dirs_exist_ok=True)
    (folder / "artifacts" / "initial_adapter").mkdir(parents=True)
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    if tiny:
        params["finetune"].update(TINY_SETTINGS)
        make_tiny_inputs(folder)
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")


def make_tiny_inputs(folder: Path) -> None:
    """Write what `finetune` reads: a random model, rows, and the kind of the task."""
    from stages.common.artifacts import write_json
    from stages.common.messages import Message
    from stages.common.records import make_row, write_rows

    def make(number: int) -> Any:
        question, answer = f"question {number} of {number % 7}", json.dumps({"n": number % 5})
        return make_row([Message("user", question), Message("assistant", answer)], "toy", "cc0-1.0")

    base = folder / "artifacts" / "fetch_base"
    make_model(make_config("llama-8b", tiny=True), "float32", "cpu").save_pretrained(base)
    make_tokenizer(512).save_pretrained(base)
    for name, numbers in (("train", range(48)), ("validation", range(1000, 1008))):
        write_rows(folder / "artifacts" / "split" / f"{name}.parquet", [make(number) for number in numbers])
    write_json(folder / "artifacts" / "curate" / "task.json", {"kind": "json", "label_key": None})


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


def read_result(folder: Path) -> dict[str, Any]:
    """Return what the stages reported of the training, and of the answers if they were judged."""
    trained = json.loads((folder / "reports/finetune/metrics.json").read_text(encoding="utf-8"))
    found = {
        "train_loss": trained["train_loss"],
        "tokens_per_second": trained["throughput"]["tokens_per_second"],
        "exact_match": None,
    }
    judged = folder / "reports/evaluate/metrics.json"
    if judged.exists():
        tuned = json.loads(judged.read_text(encoding="utf-8"))["tuned"]
        found["exact_match"] = tuned["exact_match"]["value"]
    return found


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keep", type=Path, help="run in this folder, and leave it")


if __name__ == "__main__":
    run_part(__doc__, measure, _add_arguments)
