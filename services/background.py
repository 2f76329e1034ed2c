"""Background work on the event loop of the service."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

RETRY_S = 1.0

logger = logging.getLogger("services.background")


class BackgroundTasks:
    """Tasks that outlive the request that started them."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` in the background; its exceptions are logged."""
        task = asyncio.ensure_future(_log_errors(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def settle(self) -> None:
        """Wait until no task is left."""
        while self._tasks:
            await asyncio.wait(self._tasks)


async def _log_errors(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except Exception:
        logger.exception("background work failed")


async def run_forever(work: Callable[[], Awaitable[None]]) -> None:
    """Run `work` repeatedly until cancelled; exceptions are logged, and it is run again."""
    while True:
        try:
            await work()
        except asyncio.CancelledError:
            raise
        except Exception:
            logger.exception("background work failed; it is run again in %g s", RETRY_S)
            await asyncio.sleep(RETRY_S)
