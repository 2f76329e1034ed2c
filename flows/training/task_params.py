"""Put the parameters of a shipped task in the place of `params.yaml`: `make run TASK=tools`.

`params.yaml` is the only file that DVC, the stages, the service and the flows read. `params.NAME.yaml` has
the parameters of the shipped task NAME; `default` is the `params.yaml` of the last commit. The file is
replaced only if nothing is lost by it: if its text is that of the last commit or of a shipped file.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from stages.common.artifacts import write_text
from stages.common.errors import InputError
from stages.common.params.loading import load_params
from stages.common.repository.git import run_git

PARAMS = "params.yaml"
DEFAULT = "default"

logger = logging.getLogger("flows.training.task_params")


def list_tasks(root: Path) -> list[str]:
    """Return the names of the tasks that the checkout at `root` has parameters of."""
    return [DEFAULT, *sorted(path.name.split(".")[1] for path in root.glob("params.?*.yaml"))]


def use_task(root: Path, task: str) -> None:
    """Make the parameters of `task` those of the checkout at `root`.

    Hold the lock of the run: a stage reads `params.yaml` when it starts.

    Raises:
        InputError: there is no such task, or `params.yaml` has changes that would be lost.
        ParamsError: the parameters of the task are wrong; `params.yaml` stays as it is.
    """
    if task not in list_tasks(root):
        raise InputError(f"there is no task {task!r}", f"use one of: {', '.join(list_tasks(root))}")
    path = root / PARAMS
    now = path.read_text(encoding="utf-8") if path.exists() else None
    wanted = _read_committed(root) if task == DEFAULT else _read(root / _name_file(task))
    if task == DEFAULT:
        _check_default(root, wanted)
    if now == wanted:
        return
    if now is not None and now not in _list_kept(root):
        raise InputError(
            f"{PARAMS} has changes of your own, and task {task} would replace it",
            f"`make run` runs {PARAMS} as it is; to replace it, first commit it (git commit {PARAMS}) or put "
            f"the committed one back (git checkout {PARAMS})",
        )
    if task != DEFAULT:
        load_params(root / _name_file(task))
    write_text(path, wanted)
    source = "that of the last commit" if task == DEFAULT else f"a copy of {_name_file(task)}"
    logger.warning(
        "%s is now %s%s", PARAMS, source, "" if task == DEFAULT else "; back: make run TASK=default"
    )


def _name_file(task: str) -> str:
    return f"params.{task}.yaml"


def _check_default(root: Path, committed: str) -> None:
    """Check that the committed parameters are not those of another task."""
    same = [task for task in list_tasks(root)[1:] if committed == _read(root / _name_file(task))]
    if same:
        raise InputError(
            f"the {PARAMS} of the last commit is {_name_file(same[0])}, so there is no other to go back to",
            f"find the commit that changed it (git log -- {PARAMS}), then: git checkout COMMIT~1 -- {PARAMS}",
        )


def _list_kept(root: Path) -> list[str]:
    """Return the texts that `params.yaml` can be given again."""
    shipped = [_name_file(task) for task in list_tasks(root)[1:]]
    texts = [_read(root / name) for name in shipped]
    for name in (PARAMS, *shipped):
        with suppress(InputError):  # never committed
            texts.append(_read_committed(root, name))
    return texts


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _read_committed(root: Path, name: str = PARAMS) -> str:
    """Return a file as it is in the last commit."""
    return run_git(root, "show", f"HEAD:./{name}")
