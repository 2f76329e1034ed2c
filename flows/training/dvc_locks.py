"""Find the holders of DVC's own locks, and remove the locks of dead ones.

DVC keeps `.dvc/tmp/rwlock`, a JSON file with the process ids of readers and writers of each path. It
drops the entries of process ids that no longer exist by itself. It does not handle two cases: the id
belongs to another program by now (common in containers, where ids start at 1 each time), and the file
was cut short by the kill.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

logger = logging.getLogger("flows.training.dvc_locks")


@dataclass(frozen=True)
class Holder:
    """A DVC process in the same checkout."""

    pid: int
    command: str

    def __str__(self) -> str:
        return f"pid {self.pid}: {self.command}"


def find_writers(root: Path) -> list[Holder]:
    """Return the living DVC processes that are writing stage outputs."""
    try:
        entries = json.loads(_rwlock(root).read_text(encoding="utf-8")).get("write", {})
    except (FileNotFoundError, ValueError):
        return []
    holders = {Holder(entry["pid"], entry["cmd"]) for entry in entries.values()}
    return sorted((holder for holder in holders if is_alive(holder)), key=lambda holder: holder.pid)


def is_alive(holder: Holder) -> bool:
    """Return whether the process is alive and is DVC."""
    try:
        return any("dvc" in part for part in psutil.Process(holder.pid).cmdline())
    except psutil.Error:
        return False


def clear_dead(root: Path) -> int:
    """Remove the entries of dead holders; return their number. A truncated file is removed as a whole."""
    path = _rwlock(root)
    if not path.exists() or not _has_dead(path):
        return 0
    from dvc.lock import make_lock

    with make_lock(str(path.with_suffix(".lock")), tmp_dir=str(path.parent)):
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            path.unlink()
            logger.warning("removed %s, which a killed DVC process left truncated", path)
            return 1
        alive = _without_dead(entries)
        dead = sum(1 for _ in _all(entries)) - sum(1 for _ in _all(alive))
        if dead:
            path.write_text(json.dumps(alive), encoding="utf-8")
            logger.warning("released %d DVC lock%s of dead processes", dead, "" if dead == 1 else "s")
    return dead


def _rwlock(root: Path) -> Path:
    return root / ".dvc" / "tmp" / "rwlock"


def _has_dead(path: Path) -> bool:
    try:
        return any(not _entry_alive(entry) for entry in _all(json.loads(path.read_text(encoding="utf-8"))))
    except ValueError:
        return True


def _without_dead(entries: dict[str, Any]) -> dict[str, Any]:
    write = {path: entry for path, entry in entries.get("write", {}).items() if _entry_alive(entry)}
    read = {
        path: [one for one in many if _entry_alive(one)] for path, many in entries.get("read", {}).items()
    }
    return {"write": write, "read": {path: many for path, many in read.items() if many}}


def _entry_alive(entry: dict[str, Any]) -> bool:
    return is_alive(Holder(entry["pid"], entry["cmd"]))


def _all(entries: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from entries.get("write", {}).values()
    for many in entries.get("read", {}).values():
        yield from many
