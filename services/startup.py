"""From settings to something that answers, and back to nothing."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from services.answering import Answerer
from services.events import open_store, prune
from services.events.redaction import redact
from services.guard import checks
from services.keys.access import Access
from services.keys.key_file import KeyFile
from services.model_pool import Fleet, Loader, run_forever
from services.versions.__main__ import ALIASES
from stages.common.params.services import Access as AccessSettings
from stages.common.params.services import Events, Services

MAX_CLIENTS = 100_000  # whose rates are remembered, at some 100 bytes each
PRUNE_EVERY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Running:
    """A service at work: what answers, and what goes on beside the requests."""

    answerer: Answerer
    tasks: tuple[asyncio.Task[None], ...]


async def start(settings: Services, load: Loader, keys_required: bool, aliases: Path = ALIASES) -> Running:
    """Open the store, and begin to load and to follow the versions that the alias file names.

    Args:
        load: makes the version of a tag ready to answer.
        keys_required: whether a request without a key is refused.

    Raises:
        StoreUnavailable, InputError: the store cannot be opened.
    """
    await asyncio.to_thread(checks.warm)
    store = await asyncio.to_thread(
        open_store,
        settings.events.url,
        queue_size=settings.events.queue_size,
        group_rows=settings.events.group_rows,
        group_wait_s=settings.events.group_wait_ms / 1000,
        redact=lambda text: redact(text, settings.events.redact),
    )
    fleet = Fleet(load, settings.versions.keep_loaded, aliases)
    answerer = Answerer(settings, fleet, store, make_access(settings.access, keys_required))
    tasks = [asyncio.create_task(run_forever(fleet.follow))]
    if settings.events.retention_days is not None:
        tasks.append(asyncio.create_task(run_forever(lambda: _forget(settings.events))))
    return Running(answerer, tuple(tasks))


async def stop(running: Running) -> None:
    """Store what is still to be stored, end the engines, close the store."""
    for task in running.tasks:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    await running.answerer.settle()
    running.answerer.fleet.close()
    await asyncio.to_thread(running.answerer.store.close)


def make_access(settings: AccessSettings, keys_required: bool) -> Access:
    """Return the rules of who may ask, and how much."""
    return Access(
        KeyFile(Path(settings.keys_file)),
        keys_required=keys_required or settings.keys == "always",
        requests_per_minute=settings.requests_per_minute,
        tokens_per_day=settings.tokens_per_day,
        max_clients=MAX_CLIENTS,
    )


async def _forget(events: Events) -> None:
    """Remove the events that are older than they may be, and come again tomorrow."""
    assert events.retention_days is not None
    await asyncio.to_thread(prune, events.url, time.time() - events.retention_days * 86_400)
    await asyncio.sleep(PRUNE_EVERY_S)
