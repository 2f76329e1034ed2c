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
from stages.common.machine.parent import make_parent_variable
from stages.common.model.exported import TOKENIZER_FILES
from stages.common.model.loading import load_tuned
from stages.common.records import read_rows, write_rows
from stages.common.spool import pick
from stages.common.task.kinds import TASK_FILE

CODE = Path(__file__).resolve().parents[2]
TEACHER = artifacts("teacher")  # the whole model, in the folder of the training


def heal_model(
    model: Any,
    whole: Any,
    rows: int | None,
    epochs: int,
    rate: float,
    teacher_weight: float,
    seed: int,
    folder: Path,
) -> Any:
    """Return the model after a training of all its weights on training rows.

    Args:
        whole: the model from which parts were left out.
        rows: how many, at random; None for all.
        rate: peak learning rate.
        teacher_weight: share of the loss in which `whole` teaches what it finds likely at each token of the
            answers; the rest is that of the answers. With 0 it is not loaded.
        folder: is made, and removed at the end.

    Raises:
        InputError: the training fails, after a message of its own.
    """
    import torch

    _lay_out(model, rows, seed, folder)
    if teacher_weight:
        _save_model(whole, folder / TEACHER)
    _write_params(epochs, rate, teacher_weight, folder)
    run_training(folder)
    base, adapter = folder / artifacts("fetch_base"), folder / artifacts("finetune")
    healed = load_tuned(base, adapter, torch.float32, torch.device("cpu"))
    shutil.rmtree(folder)
    return healed


def run_training(folder: Path) -> None:
    """Run the stage finetune in a folder; it ends with this process, however that ends.

    Raises:
        InputError: it fails, after a message of its own.
    """
    path = os.pathsep.join(filter(None, (str(CODE), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **make_parent_variable(), "PYTHONPATH": path}
    command = [sys.executable, "-m", "stages.finetune"]
    code = subprocess.run(command, cwd=folder, env=environment, check=False).returncode
    if code != 0:
        raise InputError(
            f"the training that heals the model ended with the exit code {code}; its message is above",
            "lower compress.healing_rate if the loss was no number, or set compress.healing_rows: 0",
        )


def _lay_out(model: Any, count: int | None, seed: int, folder: Path) -> None:
    """Write what finetune reads: the model as base, rows and task."""
    _save_model(model, folder / artifacts("fetch_base"))
    validation = artifacts("split") / "validation.parquet"
    for path in (TASK_FILE, validation, reports("fetch_base") / "metrics.json"):
        make_folder((folder / path).parent)
        shutil.copyfile(path, folder / path)
    train = artifacts("split") / "train.parquet"
    rows = read_rows(train)
    if count is not None and count < len(rows):
        rows = pick(rows, sorted(random.Random(seed).sample(range(len(rows)), count)))
    write_rows(folder / train, rows)


def _save_model(model: Any, folder: Path) -> None:
    """Write a model with the tokenizer of the base model."""
    make_folder(folder)
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if name != "config.json" and (artifacts("fetch_base") / name).is_file():
            shutil.copyfile(artifacts("fetch_base") / name, folder / name)


def _write_params(epochs: int, rate: float, teacher_weight: float, folder: Path) -> None:
    """Write the parameters of this folder, with a training of all weights that asks nothing meanwhile.

    The temperature of a distillation is 1: the whole model is no stranger whose probabilities must be
    softened. So do Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation"
    (arXiv:2407.14679).
    """
    values = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    values["finetune"] |= {
        "method": "full",
        "warm_start_from": None,
        "learning_rate": rate,
        "epochs": epochs,
        "teacher": str(TEACHER) if teacher_weight else None,
        "distill": "logits",
        "teacher_weight": teacher_weight,
        "temperature": 1.0,
        "validate_every": None,
        "early_stopping": None,
        "checkpoint_url": None,  # it is of minutes, and its checkpoints are of no use elsewhere
        # This host alone heals, which may have fewer devices than the hosts of a training.
        "devices": "auto",
        "sharding": "none",
        "launcher": "local",
    }
    write_text(folder / "params.yaml", yaml.safe_dump(values, allow_unicode=True, sort_keys=False))
