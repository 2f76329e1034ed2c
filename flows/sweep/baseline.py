"""What all trials of a sweep share: the rows, the base model, the code, and a checkout in which they train.

The checkout shares DVC's cache, so that the data stages do not run again: what they made is linked out of
the cache. A trial runs the stages `preflight`, which refuses what cannot work, and `finetune` there; the
workspace stays as it is.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flows.common.checkout import make_checkout, run_python
from flows.sweep.experiments import read_head
from flows.sweep.space import SECTION, Space
from flows.training.plan import Plan
from stages.common.artifacts import STATE, artifacts, make_folder, reports, write_text
from stages.common.errors import InputError
from stages.common.model.adapter import FOLDER as ADAPTER
from stages.common.params.loading import Params, load_params
from stages.common.params.loop import SweepFlow
from stages.common.records import read_rows
from stages.common.repository.dvc_lock import compute_dvc_hash
from stages.common.repository.git import run_git
from stages.common.task.kinds import read_task
from stages.common.task.protocol import Task

FOLDER = STATE / "sweep"
STUDIES = FOLDER / "studies.db"
CHECKOUT = FOLDER / "checkout"
CHECKED, TRAINED = "preflight", "finetune"  # the stages of a trial
CACHE_TYPE = "reflink,hardlink,symlink,copy"  # the base model is not copied where it can be linked
NAME_DIGITS = 10


@dataclass(frozen=True)
class Baseline:
    """What all trials of a sweep start from.

    Attributes:
        name: of everything that decides how a trial ends; another one is another study.
        head: the commit to which the experiments belong.
        checkout: the folder in which trials train.
        params: the text of `params.yaml`.
        lock: `dvc.lock` without the training.
    """

    name: str
    head: str
    checkout: Path
    params: str
    lock: Mapping[str, Any]

    @property
    def lock_text(self) -> str:
        """The text of `dvc.lock` before a training."""
        return yaml.safe_dump(dict(self.lock), sort_keys=False)


def make_baseline(root: Path, params: Params, plan: Plan) -> Baseline:
    """Make the checkout of the trials, or update it.

    Args:
        plan: of the stages up to the training; those before it are up to date.

    Raises:
        InputError: the folder is no git checkout with a commit, or DVC has not cached what a stage made.
    """
    head = read_head(root)
    text = (root / "params.yaml").read_text(encoding="utf-8")
    lock = _read_lock(root)
    checkout = make_checkout(root, root / CHECKOUT, cache_type=CACHE_TYPE)
    _copy_adapter(root, checkout)
    name = compute_name(checkout, params, head, lock)
    baseline = Baseline(name, head, checkout, text, lock)
    write_text(checkout / "dvc.lock", baseline.lock_text)
    upstream = {stage.name: stage.upstream for stage in plan.stages}
    needed = sorted({*upstream.get(CHECKED, ()), *upstream[TRAINED]})
    run_python(checkout, "-m", "dvc", "checkout", "--quiet", "--force", *needed)
    return baseline


def check_metric(root: Path, settings: SweepFlow) -> Task:
    """Check that validation rows have the metric; return the task.

    Raises:
        InputError: there are none, or they do not have it.
    """
    rows = read_rows(root / artifacts("split") / "validation.parquet")
    if not rows:
        raise InputError(
            "there are no validation rows, and trials are compared on them", "raise split.validation_fraction"
        )
    task = read_task(root)
    task.check_comparable([row.answer for row in rows], settings.metric, "flows.sweep.metric")
    return task


def _read_lock(root: Path) -> dict[str, Any]:
    """Read `dvc.lock` without the training, so that each trial trains, or takes its training from the cache.

    The stages after it stay: `dvc exp apply` would end with an error if an experiment lacked their outputs.
    """
    recorded = yaml.safe_load((root / "dvc.lock").read_text(encoding="utf-8"))
    kept = {name: entry for name, entry in recorded["stages"].items() if name != TRAINED}
    return {**recorded, "stages": kept}


def _copy_adapter(root: Path, checkout: Path) -> None:
    """Copy the adapter from which trainings start, which git ignores."""
    source, target = root / ADAPTER, checkout / ADAPTER
    if not source.is_dir():
        return
    make_folder(target.parent)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def compute_name(checkout: Path, params: Params, head: str, lock: Mapping[str, Any]) -> str:
    """Return a hash of everything that decides what a trial is told and how it ends."""
    settings = params.flows.sweep
    deps = _list_deps(checkout)
    decides = {
        "head": head,
        "code": run_git(checkout, "ls-tree", "-r", "HEAD", "--", *deps),
        "made": [
            (out["path"], out["md5"])
            for stage in lock["stages"].values()
            for out in stage.get("outs", ())
            if _is_read(out["path"], deps)
        ],
        "adapter": compute_dvc_hash(checkout / ADAPTER) if (checkout / ADAPTER).is_dir() else None,
        "fixed": _list_fixed(params, settings.space),
        "sweep": settings.model_dump(mode="json", exclude={"trials", "timeout_minutes"}),
    }
    text = json.dumps(decides, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:NAME_DIGITS]


def _list_deps(checkout: Path) -> list[str]:
    stages = yaml.safe_load((checkout / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return sorted(
        {dep for name in (CHECKED, TRAINED) if name in stages for dep in stages[name].get("deps", ())}
    )


def _is_read(out: str, deps: Sequence[str]) -> bool:
    """Return whether a stage of a trial reads an output, a part of it, or the folder that it is in."""
    path = Path(out)
    return any(path == Path(dep) or path in Path(dep).parents or Path(dep) in path.parents for dep in deps)


def _list_fixed(params: Params, space: Space) -> dict[str, Any]:
    """Return the parameters of a trial that it does not try."""
    section = params.finetune.model_dump(mode="json")
    tried = {key.partition(".")[2] for key in space}
    return {
        SECTION: {key: value for key, value in section.items() if key not in tried},
        "task": params.task.model_dump(mode="json"),
        "max_new_tokens": params.ask_base.max_new_tokens,
    }


def write_trial(baseline: Baseline, text: str) -> None:
    """Give the checkout the parameters of a trial, and no output of an earlier one.

    Raises:
        ParamsError: the values contradict each other.
    """
    checkout = baseline.checkout
    write_text(checkout / "params.yaml", text)
    load_params(checkout / "params.yaml")
    write_text(checkout / "dvc.lock", baseline.lock_text)
    for folder in (artifacts(TRAINED), reports(TRAINED)):
        shutil.rmtree(checkout / folder, ignore_errors=True)
