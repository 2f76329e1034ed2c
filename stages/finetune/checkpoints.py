"""Checkpoints: which are complete, which are kept, and whether the disk can hold them.

The trainer writes `checkpoints/finetune/<fingerprint>/checkpoint-<step>/`. A checkpoint is complete once
its `complete.json` has the size and the hash of every other file, so a killed run resumes from the last
complete one. The hash finds a file that has its size and not its content, as after a power failure.
"""

from __future__ import annotations

import platform
import shutil
from pathlib import Path
from typing import Protocol

from stages.common.artifacts import hash_file, read_json, write_json
from stages.common.errors import InputError
from stages.common.logs import get_logger
from stages.finetune.devices.group import gather, get_rank, is_first_of_host, is_main

logger = get_logger("finetune")

CHECKPOINTS = Path("checkpoints") / "finetune"
# Written into a checkpoint when everything else in it is on the disk.
COMPLETE = "complete.json"
# Checkpoints of other recipes that are kept, for a user who goes back to them.
OTHER_RUNS_KEPT = 1
PREFIX = "checkpoint-"
KEPT = 2  # of a run, the newest


class Copies(Protocol):
    """Copies of a run's checkpoints, from which a host gets those that it has not written."""

    def find_newest(self, folder: Path, own: Path | None) -> Path | None:
        """Return `own` or a newer complete checkpoint, which is fetched into `folder`."""

    def fetch(self, step: int, folder: Path) -> Path | None:
        """Return the fetched checkpoint of a step; None if its copy is not whole."""


def find_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, and remove the incomplete ones."""
    for path in _list_own(folder):
        if problem := find_problem(path):
            logger.warning("removing the checkpoint %s: %s", path, problem)
            shutil.rmtree(path)
    complete = list_complete(folder)
    return complete[-1] if complete else None


def list_complete(folder: Path) -> list[Path]:
    """Return the checkpoints that were written to their end, oldest first; their content is not read."""
    return sorted((path for path in _list_own(folder) if (path / COMPLETE).exists()), key=get_step)


def _list_own(folder: Path) -> list[Path]:
    """Return the checkpoints that the trainer wrote: not a copy that a person made, as of another name."""
    return [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]


def choose_checkpoint(folder: Path, copies: Copies | None = None) -> Path | None:
    """Return the newest complete checkpoint of the first process, for all processes to resume from.

    Args:
        copies: of the checkpoints, which may have a newer one, and from which other hosts fetch it.

    Raises:
        InputError: a host of the training does not have it.
    """
    newest = None
    if is_main():
        newest = find_checkpoint(folder)
        newest = copies.find_newest(folder, newest) if copies else newest
    newest = gather(newest)[0]
    if newest is None:
        return None
    if copies and is_first_of_host() and find_problem(newest):
        copies.fetch(get_step(newest), folder)
    seen = gather((platform.node(), find_problem(newest) is None))
    without = sorted({host for host, has_it in seen if not has_it})
    if without:
        raise InputError(
            f"{newest} of {seen[0][0]} is not, or not whole, on {', '.join(without)}",
            f"put {CHECKPOINTS} on a file system that all hosts share, set finetune.checkpoint_url to a "
            "place that all can reach, or remove it to start from the beginning",
        )
    return newest


def get_step(checkpoint: Path) -> int:
    """Return the update after which a checkpoint was written, from its name."""
    return int(checkpoint.name.removeprefix(PREFIX))


def collect_states(checkpoint: Path) -> None:
    """Put the random state of every process, written on its host, into the first one's checkpoint."""
    own = checkpoint / f"rng_state_{get_rank()}.pth"
    states = gather(own.read_bytes() if own.is_file() else b"")
    if is_main():
        for rank, state in enumerate(states):
            path = checkpoint / f"rng_state_{rank}.pth"
            if state and not path.is_file():
                path.write_bytes(state)


def mark_complete(checkpoint: Path) -> None:
    """Write the size and the hash of every file of a checkpoint, once all of them are written."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != COMPLETE)
    found = {
        str(path.relative_to(checkpoint)): {"size": path.stat().st_size, "sha256": hash_file(path)}
        for path in files
    }
    write_json(checkpoint / COMPLETE, found)


def find_problem(checkpoint: Path) -> str | None:
    """Return why a training cannot go on from a checkpoint, or None."""
    if not (checkpoint / COMPLETE).is_file():
        return "it was not written to its end"
    try:
        found = read_json(checkpoint / COMPLETE)
        expected = {name: (one["size"], one["sha256"]) for name, one in found.items()}
    except (InputError, AttributeError, TypeError, KeyError):
        return f"{COMPLETE} is damaged"
    for name, (size, sha256) in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} is cut: it has {path.stat().st_size} bytes of {size}"
        if hash_file(path) != sha256:
            return f"{name} is damaged: it has its size and another content"
    return None


def remove_other_runs(folder: Path, kept: int = OTHER_RUNS_KEPT) -> None:
    """Remove the checkpoints of runs other than `folder`, except those of the `kept` newest."""
    if not folder.parent.exists():
        return
    others = [path for path in folder.parent.iterdir() if path.is_dir() and path != folder]
    for path in sorted(others, key=lambda p: p.stat().st_mtime, reverse=True)[kept:]:
        shutil.rmtree(path)


def check_free_space(folder: Path, trained_parameters: int, keeps_best: bool = False) -> None:
    """Fail before the training if the disk cannot hold the checkpoints.

    Three at once (two kept, one being written), each with what is trained and two moments in float32.

    Args:
        keeps_best: whether early stopping keeps the best weights, in a file and in each checkpoint; the four
            can be of different updates.

    Raises:
        InputError: with the space that is free and the space that is needed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    needed = (3 * 3 + (4 if keeps_best else 0)) * 4 * trained_parameters
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"the disk of {folder} has {free >> 20} MiB left, and the checkpoints need {needed >> 20} MiB",
            "free some space, or train fewer weights: a lower finetune.rank, or finetune.method: lora",
        )
