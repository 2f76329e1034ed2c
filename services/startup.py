"""Start and stop the service: event store, models, background tasks."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from services.answering.handler import ChatHandler
from services.background import run_forever
from services.events import ClockInDoubt, open_store, prune
from services.guard import checks
from services.keys.access import Access
from services.keys.key_file import KeyFile
from services.model_pool import Loader, ModelPool
from services.schemas.trials import SchemaTrials
from services.versions.aliases import ALIASES
from stages.common.params.services import Access as AccessSettings
from stages.common.params.services import Events, Services
from stages.common.privacy.redaction import redact

MAX_CLIENTS = 100_000  # clients with a rate in memory, about 100 bytes each
PRUNE_EVERY_S = 86_400.0

logger = logging.getLogger("services.startup")


@dataclass(frozen=True, slots=True)
class RunningService:
    """A started service: the handler of its requests, and its background tasks."""

    handler: ChatHandler
    tasks: tuple[asyncio.Task[None], ...]


async def start(
    settings: Services,
    load: Loader,
    keys_required: bool,
    aliases: Path = ALIASES,
    initial: str | None = None,
) -> RunningService:
    """Open the event store, and start loading the versions that the alias file names.

    Args:
        load: loads the version of a tag.
        keys_required: reject requests without an API key.
        initial: tag of the version to serve while the alias file names no champion.

    Raises:
        StoreUnavailable, InputError: the store cannot be opened.
    """
    await asyncio.to_thread(checks.warm_up)
    store = await asyncio.to_thread(
        open_store,
        settings.events.url,
        queue_size=settings.events.queue_size,
        group_rows=settings.events.group_rows,
        group_wait_s=settings.events.group_wait_ms / 1000,
        redact=lambda text: redact(text, settings.events.redact),
    )
    pool = ModelPool(load, settings.versions.keep_loaded, aliases, initial)
    access = make_access(settings.access, keys_required)
    handler = ChatHandler(settings, pool, store, access, SchemaTrials(settings.guard.max_schema_cpu_s))
    tasks = [asyncio.create_task(run_forever(pool.follow))]
    if settings.events.retention_days is not None:
        tasks.append(asyncio.create_task(run_forever(lambda: prune_daily(settings.events))))
    return RunningService(handler, tuple(tasks))


async def stop(running: RunningService) -> None:
    """Store pending events, stop the engines, close the store."""
    for task in running.tasks:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    await running.handler.settle()
    running.handler.schemas.close()
    running.handler.pool.close()
    await asyncio.to_thread(running.handler.store.close)


def make_access(settings: AccessSettings, keys_required: bool) -> Access:
    """Return the access control of the settings."""
    return Access(
        KeyFile(Path(settings.keys_file)),
        keys_required=keys_required or settings.keys == "always",
        requests_per_minute=settings.requests_per_minute,
        tokens_per_day=settings.tokens_per_day,
        max_clients=MAX_CLIENTS,
    )


async def prune_daily(events: Events) -> None:
    """Delete events older than the retention period, then wait a day."""
    assert events.retention_days is not None
    try:
        await asyncio.to_thread(prune, events.url, events.retention_days * 86_400)
    except ClockInDoubt as error:
        logger.error("no old events were deleted; tried again in a day: %s", error)
    await asyncio.sleep(PRUNE_EVERY_S)
