"""Delete old events."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Engine, delete, exists, func, insert, select

from services.events.opening import open_database
from services.events.schema import exchanges, feedback, prunings
from stages.common.errors import InputError
from stages.common.logs import get_logger

logger = get_logger("events")

PAGE_ROWS = 1000  # deleted in one transaction
# All exchanges, or more than this number and this share of them, are deleted at once only if the clock is
# beyond doubt: a clock that jumps ahead makes every event old.
MAX_ROWS = 100
MAX_SHARE = 0.5
DOUBTED_AFTER_S = 7 * 86_400.0  # since the last pruning; without one, between two exchanges


class ClockInDoubt(InputError):
    """Most events are old by a clock that may have jumped."""


@dataclass(frozen=True, slots=True)
class Pruned:
    """How many rows `prune` deleted."""

    exchanges: int
    feedback: int


def prune(url: str, older_than_s: float, now: float | None = None, *, clock_is_right: bool = False) -> Pruned:
    """Delete exchanges received more than `older_than_s` ago and their feedback; return the counts.

    Feedback without an exchange is deleted by its own time. Deletes in short transactions, so that the
    service can write in between; SQLite's file shrinks afterwards.

    Args:
        now: unix s; None for this machine's clock.
        clock_is_right: a person has looked at the clock, so that any number may go.

    Raises:
        ClockInDoubt: most exchanges would go, and the clock may have jumped.
        InputError: as `read_exchanges`.
    """
    now = time.time() if now is None else now
    before = now - older_than_s
    old_exchanges = select(exchanges.c.request_id).where(exchanges.c.received_at < before)
    orphan = ~exists().where(exchanges.c.request_id == feedback.c.request_id)
    old_feedback = select(feedback.c.feedback_id).where(feedback.c.given_at < before, orphan)
    with open_database(url) as engine:
        if not clock_is_right:
            _check_clock(engine, before, now)
        exchanges_gone, feedback_gone = delete_selected(engine, old_exchanges)
        _, orphans_gone = delete_selected(engine, old_feedback, only_feedback=True)
        with engine.execution_options(writes=True).begin() as connection:
            connection.execute(delete(prunings))
            connection.execute(insert(prunings).values(pruned_at=now))
        release_pages(engine)
    return Pruned(exchanges_gone, feedback_gone + orphans_gone)


def _check_clock(engine: Engine, before: float, now: float) -> None:
    """Raise ClockInDoubt if most exchanges would go, a long time after the last sign of the clock."""
    with engine.connect() as connection:
        time_of, is_old = exchanges.c.received_at, exchanges.c.received_at < before
        old, last = connection.execute(select(func.count(), func.max(time_of)).where(is_old)).one()
        total = connection.execute(select(func.count()).select_from(exchanges)).scalar_one()
        if old == 0 or (old <= MAX_ROWS and old < total):
            return
        following = connection.execute(select(func.min(time_of)).where(~is_old)).scalar()
        pruned = connection.execute(select(func.max(prunings.c.pruned_at))).scalar()
    if pruned is not None:
        since, seen, until = "the last pruning", pruned, now
    else:  # the first exchange after a jump has the wrong time as well
        since, seen, until = "the newest exchange before then", last, following or now
    if old > MAX_SHARE * total and until - seen > DOUBTED_AFTER_S:
        raise ClockInDoubt(
            f"{old} of {total} exchanges are from before {_show(before)}, and nothing of them is deleted: "
            f"the clock tells {_show(now)}, and {since} was at {_show(seen)}, so it may have jumped",
            "look at the clock of this machine; if it is right, "
            "perennial events prune --older-than-days DAYS --clock-is-right",
        )


def _show(moment: float) -> str:
    try:
        return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):  # beyond any calendar
        return f"{moment:g}"


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
