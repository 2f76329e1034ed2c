"""Versions that could not be loaded, or whose engine failed: why, and when each is tried again.

A version is tried again after 1 s, then 2, 4 … 60; after a minute of work the pause is short again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
STABLE_S = 60.0  # of work, after which a failure is the first again
MAX_ATTEMPTS = 5  # of a version that must not disturb the others again and again


@dataclass(frozen=True, slots=True)
class Failure:
    """The last failure of a version.

    Attributes:
        times: failures in a row.
        pause_s: from this failure to the next attempt; infinite if there is none.
        at: when it failed, by the clock of `LoadFailures`.
    """

    reason: str
    times: int
    pause_s: float
    at: float


@dataclass(slots=True)
class LoadFailures:
    """The failures of each version, by tag.

    Args:
        clock: seconds that only grow.
    """

    clock: Callable[[], float] = time.monotonic
    _last: dict[str, Failure] = field(default_factory=dict)
    _loaded_at: dict[str, float] = field(default_factory=dict)

    def record(self, tag: str, reason: str, max_attempts: float = math.inf) -> None:
        """Record a failure; after `max_attempts` in a row the version is given up."""
        now = self.clock()
        if now - self._loaded_at.pop(tag, math.inf) >= STABLE_S:
            self._last.pop(tag, None)
        times = self.count(tag) + 1
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(times - 1, 16))
        self._last[tag] = Failure(reason, times, math.inf if times >= max_attempts else pause_s, now)

    def note_loaded(self, tag: str) -> None:
        """Record that a version was loaded; its failures are forgotten once it has worked for a minute."""
        self._loaded_at[tag] = self.clock()

    def forget(self) -> None:
        """Forget all failures, so that every version is tried at once."""
        self._last.clear()

    def count(self, tag: str) -> int:
        """Return how often a version has failed in a row."""
        return self._last[tag].times if tag in self._last else 0

    def may_try(self, tag: str) -> bool:
        """Return whether the pause after the last failure is over."""
        failure = self._last.get(tag)
        return failure is None or self.clock() >= failure.at + failure.pause_s

    def describe(self, tag: str) -> str | None:
        """Return why a version is not served and when it is tried again; None if it has not failed."""
        failure = self._last.get(tag)
        if failure is None:
            return None
        then = f"the next attempt is {failure.pause_s:g} s later"
        if math.isinf(failure.pause_s):
            then = "there is no further attempt until the aliases change"
        return f"{tag} is not served: {failure.reason} (failure {failure.times} in a row; {then})"
