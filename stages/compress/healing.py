"""Train a model on after parts of it were left out: the stage finetune, in a folder of its own."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from stages.common.artifacts import artifacts, make_folder, reports, write_text
from stages.common.errors import InputError
from stages.common.model.exported import TOKENIZER_FILES
from stages.common.model.loading import load_tuned
from stages.common.records import read_rows, write_rows
from stages.common.spool import pick
from stages.common.task.kinds import TASK_FILE

CODE = Path(__file__).resolve().parents[2]


def heal_model(model: Any, rows: int | None, epochs: int, rate: float, seed: int, folder: Path) -> Any:
    """Return the model after a training of all its weights on training rows.

    Args:
        rows: how many, at random; None for all.
        rate: peak learning rate.
        folder: is made, and removed at the end.

    Raises:
        InputError: the training fails, after a message of its own.
    """
    import torch

    _lay_out(model, rows, seed, folder)
    _write_params(epochs, rate, folder)
    path = os.pathsep.join(filter(None, (str(CODE), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "stages.finetune"]
    code = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, check=False).returncode
    if code != 0:
        raise InputError(
            f"the training that heals the model ended with the exit code {code}; its message is above",
            "lower compress.healing_rate if the loss was no number, or set compress.healing_rows: 0",
        )
    base, adapter = folder / artifacts("fetch_base"), folder / artifacts("finetune")
    healed = load_tuned(base, adapter, torch.float32, torch.device("cpu"))
    shutil.rmtree(folder)
    return healed


def _lay_out(model: Any, count: int | None, seed: int, folder: Path) -> None:
    """Write what finetune reads: the model as base, rows and task."""
    base = folder / artifacts("fetch_base")
    make_folder(base)
    model.save_pretrained(base)
    for name in TOKENIZER_FILES:
        if name != "config.json" and (artifacts("fetch_base") / name).is_file():
            shutil.copyfile(artifacts("fetch_base") / name, base / name)
    validation = artifacts("split") / "validation.parquet"
    for path in (TASK_FILE, validation, reports("fetch_base") / "metrics.json"):
        make_folder((folder / path).parent)
        shutil.copyfile(path, folder / path)
    train = artifacts("split") / "train.parquet"
    rows = read_rows(train)
    if count is not None and count < len(rows):
        rows = pick(rows, sorted(random.Random(seed).sample(range(len(rows)), count)))
    write_rows(folder / train, rows)


def _write_params(epochs: int, rate: float, folder: Path) -> None:
    """Write the parameters of this folder, with a training of all weights that asks nothing meanwhile."""
    values = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    values["finetune"] |= {
        "method": "full",
        "warm_start_from": None,
        "learning_rate": rate,
        "epochs": epochs,
        "validate_every": None,
        "early_stopping": None,
        "checkpoint_url": None,  # it is of minutes, and its checkpoints are of no use elsewhere
        "launcher": "local",
    }
    write_text(folder / "params.yaml", yaml.safe_dump(values, allow_unicode=True, sort_keys=False))
