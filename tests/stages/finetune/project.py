"""A project that finetune can train on within a second."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

from stages.common.artifacts import write_json
from stages.common.messages import Message
from stages.common.model.adapter import PREFERENCE_METHODS, find_weights, put_initial_adapter
from stages.common.params.loading import load_params
from stages.common.records import make_row, write_rows
from stages.finetune.recipe import Recipe
from tests.tiny import save_model

REPO = Path(__file__).resolve().parents[3]
MODULE = ("-m", "stages.finetune")
SHOWING_IMPORTS = ("-X", "importtime", *MODULE)
SETTINGS = {
    "rank": 4,
    "alpha": 8,
    "learning_rate": 0.01,
    "batch_size": 4,
    "gradient_accumulation": 1,
    "epochs": 1,
    "max_length": 200,
    "checkpoint_every_steps": 3,
    "dtype": "float32",
}


def make_recipe(**changes):
    """Return the recipe of the shipped parameters with the settings of this project."""
    values = {**load_params(REPO / "params.yaml").finetune.model_dump(), **SETTINGS, **changes}
    return Recipe(**{name: values[name] for name in Recipe.__dataclass_fields__ if name in values})


def rows(count, start=0, with_pairs=False):
    """Return rows; with pairs each has a worse answer, too, of another length."""
    return [
        make_row(
            [
                Message("system", "Answer."),
                Message("user", "abc"[n % 3] * (1 + n % 7) + str(n)),
                Message("assistant", f'{{"n":{n % 5}}}'),
            ],
            "toy",
            "cc0-1.0",
            rejected=Message("assistant", f"it is {n % 5}" + "!" * (n % 4)) if with_pairs else None,
        )
        for n in range(start, start + count)
    ]


def make_project(folder, count=40, **changes):
    """Lay out what finetune reads: the base model, the split and params.yaml."""
    save_model(folder / "artifacts" / "fetch_base")
    (folder / "artifacts" / "split").mkdir()
    with_pairs = changes.get("method") in PREFERENCE_METHODS
    write_rows(folder / "artifacts" / "split" / "train.parquet", rows(count, with_pairs=with_pairs))
    write_rows(folder / "artifacts" / "split" / "validation.parquet", rows(8, 1000, with_pairs))
    write_rows(folder / "artifacts" / "split" / "refused.parquet", [])
    if changes.get("method") == "distill":
        save_model(folder / str(changes["teacher"]), seed=3)
    write_json(folder / "artifacts" / "curate" / "task.json", {"kind": "json", "label_key": None})
    params = yaml.safe_load((REPO / "params.yaml").read_text())
    params["finetune"].update({**SETTINGS, **changes})
    params["export"]["gguf"] = False  # which not every method has
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    return folder


def make_labels(project, count=5):
    """Make the answers of the rows the labels of the task, as the method head needs them."""
    labels = [f'{{"n":{n}}}' for n in range(count)]
    task = {"kind": "label", "label_key": None, "labels": labels}
    write_json(project / "artifacts" / "curate" / "task.json", task)
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["task"].update(kind="label", label_key=None)
    (project / "params.yaml").write_text(yaml.safe_dump(params))


def put_own_adapter(project, version="0123456789ab"):
    """What the retraining flow does with the champion's adapter."""
    metrics = project / "reports" / "fetch_base" / "metrics.json"
    metrics.parent.mkdir(parents=True, exist_ok=True)
    metrics.write_text('{"sha256": "of the base"}')
    put_initial_adapter(
        project / "artifacts" / "finetune", version, "of the base", project / "artifacts" / "initial_adapter"
    )


def change_finetune(project, **changes):
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["finetune"].update(changes)
    (project / "params.yaml").write_text(yaml.safe_dump(params))


def adapter(project):
    return find_weights(project / "artifacts" / "finetune").read_bytes()


def evidence(project):
    metrics = json.loads((project / "reports" / "finetune" / "metrics.json").read_text())
    metrics.pop("throughput")
    return metrics


def start_stage(project, command=MODULE, **variables):
    """Start finetune in a project, in a session of its own; its output is one stream."""
    environment = {**os.environ, "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1", **variables}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=project,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish_with_imports(stage):
    """Wait for a stage that was started with `SHOWING_IMPORTS`; return the packages it imported modules of.

    A package that is not found is in Python's list too, but no module of it.
    """
    output, _ = stage.communicate(timeout=600)
    assert stage.returncode == 0, output
    return set(re.findall(r"^import time:.*\|\s*(\w+)\.\S+$", output, re.M))
