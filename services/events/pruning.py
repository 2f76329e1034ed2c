"""Delete old events."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, delete, exists, select

from services.events.opening import open_database
from services.events.schema import exchanges, feedback
from stages.common.logs import get_logger

logger = get_logger("events")

PAGE_ROWS = 1000  # deleted in one transaction


@dataclass(frozen=True, slots=True)
class Pruned:
    """How many rows `prune` deleted."""

    exchanges: int
    feedback: int


def prune(url: str, before: float) -> Pruned:
    """Delete exchanges received before `before` (unix s) and their feedback; return the counts.

    Feedback without an exchange is deleted by its own time. Deletes in short transactions, so that the
    service can write in between; SQLite's file shrinks afterwards.

    Raises:
        InputError: as `read_exchanges`.
    """
    old_exchanges = select(exchanges.c.request_id).where(exchanges.c.received_at < before)
    orphan = ~exists().where(exchanges.c.request_id == feedback.c.request_id)
    old_feedback = select(feedback.c.feedback_id).where(feedback.c.given_at < before, orphan)
    with open_database(url) as engine:
        exchanges_gone, feedback_gone = delete_selected(engine, old_exchanges)
        _, orphans_gone = delete_selected(engine, old_feedback, only_feedback=True)
        release_pages(engine)
    return Pruned(exchanges_gone, feedback_gone + orphans_gone)


def delete_selected(engine: Engine, wanted: Any, only_feedback: bool = False) -> tuple[int, int]:
    """Delete the selected exchanges and their feedback, in short transactions; return both counts.

    Args:
        wanted: selects request ids; feedback ids where `only_feedback`.
    """
    counts = [0, 0]
    while ids := _delete_some(engine, wanted, counts, only_feedback):
        logger.debug("deleted %d", ids)
        time.sleep(0.005)  # SQLite's lock is not fair: give other writers a chance
    return counts[0], counts[1]


def _delete_some(engine: Engine, wanted: Any, counts: list[int], only_feedback: bool) -> int:
    with engine.execution_options(writes=True).begin() as connection:
        ids = list(connection.execute(wanted.limit(PAGE_ROWS)).scalars())
        if not only_feedback and ids:
            counts[1] += connection.execute(delete(feedback).where(feedback.c.request_id.in_(ids))).rowcount
        table = feedback if only_feedback else exchanges
        if ids:
            gone = connection.execute(delete(table).where(table.columns[0].in_(ids))).rowcount
            counts[1 if only_feedback else 0] += gone
    return len(ids)


def release_pages(engine: Engine) -> None:
    """Truncate the free pages of SQLite's file in batches; PostgreSQL reuses space by itself."""
    if engine.dialect.name != "sqlite":
        return
    with engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        free, before = _free_pages(driver), None
        while free and free != before:  # a file created without auto_vacuum does not shrink
            driver.execute("PRAGMA incremental_vacuum(1000)").fetchall()  # frees one page per row
            free, before = _free_pages(driver), free


def _free_pages(driver: Any) -> int:
    return int(driver.execute("PRAGMA freelist_count").fetchone()[0])
