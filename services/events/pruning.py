"""Delete old events."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, delete, exists, select

from services.events.opening import opened
from services.events.schema import exchanges, feedback
from stages.common.logs import get_logger

log = get_logger("events")

PAGE_ROWS = 1000  # deleted with one transaction


@dataclass(frozen=True, slots=True)
class Pruned:
    """How many rows `prune` deleted."""

    exchanges: int
    feedback: int


def prune(url: str, before: float) -> Pruned:
    """Delete exchanges received before `before` (unix s) with the feedback on them, and return the counts.

    Feedback whose exchange is gone goes by its own time. Deletes in short transactions, between
    which the service can write; SQLite gives the freed pages back to the disk.

    Raises:
        InputError: as `read_exchanges`.
    """
    old_exchanges = select(exchanges.c.request_id).where(exchanges.c.received_at < before)
    orphan = ~exists().where(exchanges.c.request_id == feedback.c.request_id)
    old_feedback = select(feedback.c.feedback_id).where(feedback.c.given_at < before, orphan)
    with opened(url) as engine:
        counts = [0, 0]
        for number, wanted in enumerate((old_exchanges, old_feedback)):
            while ids := _prune_some(engine, wanted, counts, bool(number)):
                log.debug("pruned %d", ids)
                time.sleep(0.005)  # SQLite's lock is not fair: a writer that waits for it needs a gap
        _give_back_pages(engine)
    return Pruned(*counts)


def _prune_some(engine: Engine, wanted: Any, counts: list[int], only_feedback: bool) -> int:
    with engine.execution_options(writes=True).begin() as connection:
        ids = list(connection.execute(wanted.limit(PAGE_ROWS)).scalars())
        if not only_feedback and ids:
            counts[1] += connection.execute(delete(feedback).where(feedback.c.request_id.in_(ids))).rowcount
        table = feedback if only_feedback else exchanges
        if ids:
            gone = connection.execute(delete(table).where(table.columns[0].in_(ids))).rowcount
            counts[1 if only_feedback else 0] += gone
    return len(ids)


def _give_back_pages(engine: Engine) -> None:
    """Shorten SQLite's file by its free pages, some at a time; PostgreSQL uses the space again itself."""
    if engine.dialect.name != "sqlite":
        return
    with engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        free, before = _free_pages(driver), None
        while free and free != before:  # a file that was made without it does not shrink
            driver.execute("PRAGMA incremental_vacuum(1000)").fetchall()  # a page is freed with each row
            free, before = _free_pages(driver), free


def _free_pages(driver: Any) -> int:
    return int(driver.execute("PRAGMA freelist_count").fetchone()[0])
