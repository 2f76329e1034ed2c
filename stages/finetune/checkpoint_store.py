"""Copies of checkpoints at a URL, from which a training goes on that was killed on another machine.

A run's folder is `finetune.checkpoint_url` with its fingerprint; its checkpoints are as on the disk.
The `complete.json` of a copy is written last and removed first, so half a copy is never taken for a
checkpoint; its sizes and hashes find a file that was cut or damaged on the way.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from stages.common.artifacts import atomic_dir
from stages.common.errors import InputError
from stages.common.logs import get_logger
from stages.common.storage.remote_folder import RemoteFolder, run_in_time
from stages.finetune.checkpoints import COMPLETE, KEPT, PREFIX, find_problem, get_step

logger = get_logger("finetune")

# How long a training waits for a copy to be made, or for an answer when one is fetched. Several processes
# give up on each other after ten minutes.
COPY_PATIENCE_S = 300.0
SLOWEST_BYTES_PER_S = 1 << 20  # of a file that is fetched: it is waited for so much longer
_COMPLETE_COPY = re.compile(rf"{PREFIX}(\d+)/{COMPLETE}")


class _DamagedError(Exception):
    """A copy that is not what was written."""


class CheckpointStore:
    """The copies of the checkpoints of one run.

    A copy that fails does not end the training: it is counted, and the next checkpoint is the next try.
    """

    def __init__(self, url: str, fingerprint: str) -> None:
        self._store, self._run = RemoteFolder(url), fingerprint
        self.url = f"{self._store.url}/{fingerprint}"
        self._tried = self._failed = 0
        self._copying = False

    def find_newest(self, folder: Path, own: Path | None) -> Path | None:
        """Return `own`, or a newer complete checkpoint, which is fetched into `folder`.

        Raises:
            InputError: the store cannot be read in time, or the disk is too full.
        """
        own_step = get_step(own) if own else -1
        stored: list[int] = self._read_in_time(self._list_complete)
        for step in reversed(stored):
            if step > own_step and (fetched := self.fetch(step, folder)):
                return fetched
        if own and own_step not in stored:
            self.copy(own)
        return own

    def fetch(self, step: int, folder: Path) -> Path | None:
        """Return the checkpoint of a step, fetched into `folder`; None, with a warning, if it is cut.

        Raises:
            InputError: the store cannot be read in time, or the disk is too full.
        """
        name = f"{PREFIX}{step}"
        target = folder / name
        try:
            with atomic_dir(target) as temporary:
                self._fetch_files(name, temporary)
                if problem := find_problem(temporary):
                    raise _DamagedError(problem)
        except (_DamagedError, FileNotFoundError) as error:
            logger.warning("the checkpoint %s/%s is not used: %s", self.url, name, error)
            return None
        logger.info("%s was fetched from %s", target, self.url)
        return target

    def _read_in_time(self, work: Callable[[], Any], size: int = 0) -> Any:
        """Return what a call of the store returns that reads so many bytes."""
        try:
            return run_in_time(work, COPY_PATIENCE_S + size / SLOWEST_BYTES_PER_S)
        except FileNotFoundError:
            raise
        except Exception as error:  # each library has errors of its own
            raise InputError(
                f"the checkpoints at {self.url} cannot be read: {type(error).__name__}: {error}",
                "run again when the store answers, or set finetune.checkpoint_url: null to do without them",
            ) from error

    def _fetch_files(self, name: str, target: Path) -> None:
        data = self._read_in_time(lambda: self._store.read(f"{self._run}/{name}/{COMPLETE}"))
        try:
            sizes = {str(path): int(entry["size"]) for path, entry in json.loads(data).items()}
        except (ValueError, AttributeError, TypeError, KeyError):
            raise _DamagedError(f"{COMPLETE} is damaged") from None
        outside = [path for path in sizes if PurePosixPath(path).is_absolute() or ".." in Path(path).parts]
        if outside:
            raise _DamagedError(f"{COMPLETE} names {outside[0]}, which is not in the checkpoint")
        needed, free = sum(sizes.values()), shutil.disk_usage(target).free
        if needed > free:
            raise InputError(
                f"the disk of {target.parent} has {free >> 20} MiB left, and {self.url}/{name} has "
                f"{needed >> 20} MiB",
                "free some space",
            )
        for path, size in sizes.items():
            place = f"{self._run}/{name}/{path}", target / path
            self._read_in_time(partial(self._store.get, *place), size)
        (target / COMPLETE).write_bytes(data)

    def copy(self, checkpoint: Path) -> None:
        """Copy a complete checkpoint, and remove those that are no longer kept; warn if that fails."""
        self._tried += 1
        try:
            if self._copying:
                raise TimeoutError("an earlier one is still being copied")
            run_in_time(lambda: self._copy(checkpoint), COPY_PATIENCE_S)
        except Exception as error:  # whatever a library raises, the training is worth more
            self._failed += 1
            logger.warning(
                "%s was not copied to %s (%d of %d failed); the training goes on and tries again at the "
                "next checkpoint: %s: %s",
                *(checkpoint, self.url, self._failed, self._tried, type(error).__name__, error),
            )

    def _copy(self, checkpoint: Path) -> None:
        self._copying = True
        try:
            self._remove(checkpoint.name)
            files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
            for path in sorted(files, key=lambda path: path.name == COMPLETE):
                inside = path.relative_to(checkpoint).as_posix()
                self._store.put(path, f"{self._run}/{checkpoint.name}/{inside}")
            # Those after this one are of a run that has gone back behind them.
            earlier = [step for step in self._list_complete() if step <= get_step(checkpoint)]
            kept = {f"{PREFIX}{step}" for step in earlier[-KEPT:]}
            for name in {path.partition("/")[0] for path in self._store.list_files(self._run)} - kept:
                self._remove(name)
        finally:
            self._copying = False

    def finish(self) -> None:
        """Remove the copies of a training that is done, and say how many could not be made."""
        try:
            run_in_time(lambda: self._store.remove(self._run), COPY_PATIENCE_S)
        except Exception as error:  # the training is done
            logger.warning("%s was not removed: %s: %s", self.url, type(error).__name__, error)
        if self._failed:
            logger.warning(
                "%d of %d checkpoints were not copied to %s; the warnings above have the reasons",
                *(self._failed, self._tried, self.url),
            )

    def _list_complete(self) -> list[int]:
        """Return the steps of the complete copies, oldest first."""
        found = (_COMPLETE_COPY.fullmatch(path) for path in self._store.list_files(self._run))
        return sorted(int(match[1]) for match in found if match)

    def _remove(self, name: str) -> None:
        self._store.remove(f"{self._run}/{name}/{COMPLETE}")
        self._store.remove(f"{self._run}/{name}")


def open_store(url: str | None, fingerprint: str) -> CheckpointStore | None:
    """Return where the copies of a run's checkpoints are; None where none are made."""
    return CheckpointStore(url, fingerprint) if url else None
