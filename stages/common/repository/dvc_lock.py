"""`dvc.lock`: what DVC wrote down about the run that made the files."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

LOCK = Path("dvc.lock")


@dataclass(frozen=True, slots=True)
class Lock:
    """The stages of `dvc.lock`.

    Attributes:
        hashes: every hash recorded for a path, with the stages that recorded it.
        params: the section of `params.yaml` with which each stage ran; under `task`, the keys of that
            section which some stage read.
    """

    hashes: Mapping[str, Mapping[str, tuple[str, ...]]]
    params: Mapping[str, Mapping[str, Any]]

    def hash_of(self, path: Path) -> str | None:
        """Return the hash recorded for a path, if there is exactly one."""
        found = list(self.hashes.get(path.as_posix(), {}))
        return found[0] if len(found) == 1 else None


def read_lock(names: Sequence[str], path: Path = LOCK) -> Lock:
    """Read what `dvc.lock` records of some stages; without the file nothing is recorded.

    A stage that reads the lock while it runs must not name itself or what follows it: the file still has
    what they saw the last time.
    """
    recorded = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.exists() else {}
    stages = {name: entry for name, entry in recorded.get("stages", {}).items() if name in names}
    hashes: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for stage, entry in stages.items():
        for item in (*entry.get("deps", ()), *entry.get("outs", ())):
            if "md5" in item:
                hashes[item["path"]][item["md5"]].append(stage)
    return Lock(
        hashes={name: {md5: tuple(by) for md5, by in found.items()} for name, found in hashes.items()},
        params={stage: _params_of(entry).get(stage, {}) for stage, entry in stages.items()}
        | {"task": _read_task_params(stages.values())},
    )


def _params_of(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = entry.get("params", {}).get("params.yaml", {})
    return found


def _read_task_params(entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    read = [item for entry in entries for item in _params_of(entry).items()]
    return {name.removeprefix("task."): value for name, value in sorted(read) if name.startswith("task.")}


def find_disagreements(lock: Lock, paths: Iterable[Path]) -> list[str]:
    """Return where recorded hashes differ between stages, or from the bytes on disk.

    A path of which nothing is recorded is not a problem here.
    """
    found = []
    for name, hashes in sorted(lock.hashes.items()):
        if len(hashes) > 1:
            seen = "; ".join(
                f"{' and '.join(stages)} recorded {md5}" for md5, stages in sorted(hashes.items())
            )
            found.append(f"{name}: {seen} (dvc.lock)")
    for path in paths:
        recorded = lock.hash_of(path)
        if recorded and path.exists() and (actual := compute_dvc_hash(path)) != recorded:
            found.append(f"{path} has the hash {actual}, and dvc.lock recorded {recorded}")
    return found


def compute_dvc_hash(path: Path) -> str:
    """Return the hash that DVC 3 gives a file, or a folder: that of the sorted list of its files' hashes."""
    if path.is_file():
        return _md5(path)
    files = [
        {"md5": _md5(file), "relpath": file.relative_to(path).as_posix()}
        for file in path.rglob("*")
        if file.is_file()
    ]
    listing = json.dumps(sorted(files, key=lambda file: file["relpath"]), sort_keys=True)
    return hashlib.md5(listing.encode(), usedforsecurity=False).hexdigest() + ".dir"


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
