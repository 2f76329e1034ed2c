"""The event store: every request with its answer, and the feedback on it.

An event is recorded once its transaction is on disk. One thread writes; events that arrive together share a
commit. Other processes can read at the same time.

Run: `perennial events export --from 2026-01-01T00:00 --to 2026-02-01T00:00 --out january.parquet`,
`perennial events prune --older-than-days 90`, `perennial events forget --user NAME` or
`perennial events migrate`
"""

from services.events.person import NOT_REACHED, Person, export_person, forget
from services.events.pruning import ClockInDoubt, Pruned, prune
from services.events.reading import (
    Traffic,
    count_exchanges,
    count_traffic,
    export_window,
    get_joined_schema,
    read_exchanges,
    read_feedback,
    read_joined,
    read_time_span,
    read_times,
)
from services.events.schema import (
    CLIENT_GONE,
    EVENT_FIELDS,
    TABLES,
    BadEvent,
    Event,
    Exchange,
    Feedback,
    StoreUnavailable,
)
from services.events.writing import EventStore, open_store

__all__ = [
    "CLIENT_GONE",
    "EVENT_FIELDS",
    "NOT_REACHED",
    "TABLES",
    "BadEvent",
    "ClockInDoubt",
    "Event",
    "EventStore",
    "Exchange",
    "Feedback",
    "Person",
    "Pruned",
    "StoreUnavailable",
    "Traffic",
    "count_exchanges",
    "count_traffic",
    "export_person",
    "export_window",
    "forget",
    "get_joined_schema",
    "open_store",
    "prune",
    "read_exchanges",
    "read_feedback",
    "read_joined",
    "read_time_span",
    "read_times",
]
