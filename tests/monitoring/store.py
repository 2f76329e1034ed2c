"""A real event store, filled without a service."""

from dataclasses import replace

from sqlalchemy import insert

from services.events import EVENT_FIELDS, TABLES, Feedback, open_store
from services.events.database import check_url, make_engine
from tests.exchanges import EXCHANGE


def exchange(number, at=None, **changes):
    """Return exchange `number`, received `number` s after the first, in a session of its own."""
    named = {"request_id": f"r{number:05d}", "session": f"s{number}"}
    return replace(EXCHANGE, received_at=1000.0 + number if at is None else at, **(named | changes))


def feedback(number, at=2000.0, thumb=None, correction=None):
    return Feedback(f"f{number}-{at}", f"r{number:05d}", at, None, thumb, correction, None)


def stored(url, *events):
    """Add events to the store at `url`, past the service, which would refuse broken ones; return the URL."""
    open_store(url, queue_size=1, group_rows=1, group_wait_s=0.0).close()
    add(url, *events)
    return url


def add(url, *events):
    engine = make_engine(check_url(url))
    with engine.execution_options(writes=True).begin() as connection:
        for kind, table in TABLES.items():
            rows = [
                {name: getattr(event, name) for name in EVENT_FIELDS[kind]}
                for event in events
                if type(event) is kind
            ]
            if rows:
                connection.execute(insert(table), rows)
    engine.dispose()
