"""The deadline of the request that the current task works for.

A task that is cancelled cannot see why. Only here can the work tell a request that took too long from one
whose client has left.
"""

from __future__ import annotations

import asyncio
from contextvars import ContextVar

# Set by the middleware `Deadline`; tasks that a request starts inherit it.
DEADLINE: ContextVar[asyncio.Timeout | None] = ContextVar("deadline", default=None)


def has_passed() -> bool:
    """Return whether the request was ended because its answer did not begin in time."""
    deadline = DEADLINE.get()
    return deadline is not None and deadline.expired()
