"""Time that has passed since a moment that was written down, even if the clock was set meanwhile."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # Linux; another one after each start of the machine


@dataclass(frozen=True, slots=True)
class Moment:
    """A moment by two clocks.

    Attributes:
        at: unix s, which anyone may set.
        boot: the machine's start, "" where it is not known.
        up_s: since then; it cannot be set.
    """

    at: float
    boot: str
    up_s: float


def read_moment(at: float | None = None) -> Moment:
    """Return the present moment; `at` replaces the time of its clock, unix s."""
    at = time.time() if at is None else at
    try:
        return Moment(
            at, BOOT_ID.read_text(encoding="ascii").strip(), time.clock_gettime(time.CLOCK_BOOTTIME)
        )
    except (OSError, AttributeError):
        return Moment(at, "", 0.0)


def compute_elapsed_s(began: Moment, now: Moment) -> float:
    """Return the seconds between two moments, at least 0; exact unless the machine was started in between."""
    if began.boot and began.boot == now.boot:
        return max(0.0, now.up_s - began.up_s)
    return max(0.0, now.at - began.at)
