"""Checkpoints: which are complete, which are kept, and whether the disk can hold them.

The trainer writes `checkpoints/finetune/<fingerprint>/checkpoint-<step>/`. A checkpoint is complete once
its `complete.json` has the size of every other file, so a killed run resumes from the last complete one.
"""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

from stages.common.artifacts import read_json, write_json
from stages.common.errors import InputError
from stages.common.logs import get_logger
from stages.finetune.devices.group import gather, is_main

logger = get_logger("finetune")

CHECKPOINTS = Path("checkpoints") / "finetune"
# Written into a checkpoint when everything else in it is on the disk.
COMPLETE = "complete.json"
# Checkpoints of other recipes that are kept, for a user who goes back to them.
OTHER_RUNS_KEPT = 1
PREFIX = "checkpoint-"


def find_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, and remove the incomplete ones."""
    complete: list[tuple[int, Path]] = []
    for path in folder.glob(f"{PREFIX}*"):
        if _is_complete(path):
            complete.append((get_step(path), path))
        else:
            logger.info("removing %s: it is incomplete", path)
            shutil.rmtree(path)
    return max(complete)[1] if complete else None


def choose_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of the first process, for all processes to resume from.

    Raises:
        InputError: a host of the training does not have it.
    """
    newest = gather(find_checkpoint(folder) if is_main() else None)[0]
    if newest is None:
        return None
    seen = gather((platform.node(), _is_complete(newest)))
    without = sorted({host for host, has_it in seen if not has_it})
    if without:
        raise InputError(
            f"{newest} of {seen[0][0]} is not, or not whole, on {', '.join(without)}",
            f"put {CHECKPOINTS} on a file system that all hosts share, copy it to them, "
            "or remove it to start from the beginning",
        )
    return newest


def get_step(checkpoint: Path) -> int:
    """Return the update after which a checkpoint was written, from its name."""
    return int(checkpoint.name.removeprefix(PREFIX))


def mark_complete(checkpoint: Path) -> None:
    """Write the size of every file of a checkpoint, once all of them are written."""
    sizes = {path.name: path.stat().st_size for path in sorted(checkpoint.iterdir()) if path.is_file()}
    write_json(checkpoint / COMPLETE, sizes)


def _is_complete(checkpoint: Path) -> bool:
    try:
        sizes = read_json(checkpoint / COMPLETE)
    except InputError:
        return False
    return all((checkpoint / n).is_file() and (checkpoint / n).stat().st_size == s for n, s in sizes.items())


def remove_other_runs(folder: Path, kept: int = OTHER_RUNS_KEPT) -> None:
    """Remove the checkpoints of runs other than `folder`, except those of the `kept` newest."""
    if not folder.parent.exists():
        return
    others = [path for path in folder.parent.iterdir() if path.is_dir() and path != folder]
    for path in sorted(others, key=lambda p: p.stat().st_mtime, reverse=True)[kept:]:
        shutil.rmtree(path)


def check_free_space(folder: Path, trained_parameters: int) -> None:
    """Fail before the training if the disk cannot hold the checkpoints.

    Three at once (two kept, one being written), each with the adapter and two moments in float32.

    Raises:
        InputError: with the space that is free and the space that is needed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    needed = 3 * 3 * 4 * trained_parameters
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"the disk of {folder} has {free >> 20} MiB left, and the checkpoints need {needed >> 20} MiB",
            "free some space, or lower finetune.rank",
        )
