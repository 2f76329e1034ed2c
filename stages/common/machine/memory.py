"""How much memory this machine has, and how much of it a process may still take."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
MIB = 1 << 20


def read_total_memory() -> int:
    """Return the bytes of memory of the machine, or of the container if it may have less."""
    limits = [limit for limit, _ in _read_cgroups()]
    return int(min([psutil.virtual_memory().total, *limits]))


def read_free_memory() -> int:
    """Return the bytes that this process can still take without swapping, within its container's limit."""
    left = [limit - used for limit, used in _read_cgroups()]
    return max(0, int(min([psutil.virtual_memory().available, *left])))


def read_held_memory() -> int:
    """Return the bytes of memory that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def read_peak_memory() -> int:
    """Return the most bytes of memory that this process has held.

    Linux counts what the parent held at the fork in `ru_maxrss`, also after exec; not so in VmHWM (proc(5)).
    """
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def release_freed_memory() -> None:
    """Give blocks that were freed back to the system, where the C library can: glibc keeps them otherwise.

    Before other work with blocks of other sizes, which would not fit into their places.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def format_bytes(size: float) -> str:
    """Return a size as text, in MiB or GiB."""
    return f"{size / MIB:,.0f} MiB" if size < 10_000 * MIB else f"{size / MIB / 1024:,.1f} GiB"


def _read_cgroups() -> list[tuple[int, int]]:
    """Return limit and use of each control group of this process that has a limit, in bytes.

    Files that the kernel only caches do not count as used: it gives them up first.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            folder, files = CGROUPS, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            folder, files = CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        place = folder / name.strip("/")
        for group in (place, *place.parents):
            if group.is_relative_to(folder) and (one := _read_cgroup(group, *files)):
                found.append(one)
    return found


def _read_cgroup(group: Path, limit_file: str, use_file: str) -> tuple[int, int] | None:
    try:
        limit = (group / limit_file).read_text(encoding="ascii").strip()
        used = int((group / use_file).read_text(encoding="ascii"))
        kept = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    if not limit.isdigit() or int(limit) >= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        return None
    return int(limit), used - int(kept.get("inactive_file", 0)) - int(kept.get("active_file", 0))
