"""Events, and the tables that store them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

from sqlalchemy import (
    Boolean,
    CheckConstraint,
    Column,
    Double,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    insert,
)


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and its answer, or its rejection.

    Attributes:
        received_at: unix time, s.
        role: "champion", "challenger" or "shadow" (not shown).
        shadow_of: request_id of the shown answer that a shadow repeats.
        messages, parameters: JSON.
        decisions: JSON {check: [allow, reason]} of the guard's decisions.
        status: HTTP status.
        reason: code of the rejection or error.
        reasoning: what the model thought before the answer; None for none.
    """

    request_id: str
    received_at: float
    route: str
    key_id: str | None
    user: str | None
    session: str | None
    role: str
    shadow_of: str | None
    model: str
    version: str
    messages: str
    parameters: str
    status: int
    reason: str | None
    answer: str | None
    reasoning: str | None
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    queue_s: float
    first_token_s: float | None
    total_s: float
    decisions: str
    valid_output: bool | None
    mean_logprob: float | None


@dataclass(frozen=True, slots=True)
class Feedback:
    """Feedback on an answer; `given_at` is unix time in s, `thumb` is 1 or -1."""

    feedback_id: str
    request_id: str
    given_at: float
    key_id: str | None
    thumb: int | None
    correction: str | None
    comment: str | None


CLIENT_GONE = 499  # status of an exchange whose client disconnected, as in nginx

Event = Exchange | Feedback
EVENT_FIELDS = {kind: tuple(field.name for field in fields(kind)) for kind in (Exchange, Feedback)}
EVENT_VALUES = {kind: attrgetter(*names) for kind, names in EVENT_FIELDS.items()}
# What users write; "parameters" holds stop strings and schemas.
REDACTED = ("messages", "parameters", "answer", "reasoning", "correction", "comment")

metadata = MetaData()
COLUMN_TYPES = {"str": Text, "float": Double, "int": Integer, "bool": Boolean}


def _columns(kind: type[Event]) -> list[Column[Any]]:
    """Return a column for each field, the first as primary key; a test compares them with the migrations."""
    columns: list[Column[Any]] = []
    for number, field in enumerate(fields(kind)):
        name, _, optional = str(field.type).partition(" | ")
        columns.append(
            Column(field.name, COLUMN_TYPES[name], primary_key=number == 0, nullable=bool(optional))
        )
    return columns


exchanges = Table(
    "exchanges", metadata, *_columns(Exchange), Index("exchanges_by_time", "received_at", "request_id")
)
feedback = Table(
    "feedback",
    metadata,
    *_columns(Feedback),
    Index("feedback_by_time", "given_at", "feedback_id"),
    Index("feedback_by_request", "request_id"),
    CheckConstraint("thumb IN (1, -1)", name="thumb_is_up_or_down"),
)
prunings = Table("prunings", metadata, Column("pruned_at", Double, nullable=False))  # only the last one
TABLES = {Exchange: exchanges, Feedback: feedback}
INSERTS = {kind: insert(table) for kind, table in TABLES.items()}


def count_chars(event: Event) -> int:
    """Return how many characters of the texts of an event are redacted before it is written."""
    texts = (getattr(event, name, None) for name in REDACTED)
    return sum(len(text) for text in texts if isinstance(text, str))


class StoreUnavailable(Exception):
    """The store could not record the event; the message has the reason.

    After a timeout or a lost connection the event may have been recorded nevertheless.
    """


class BadEvent(ValueError):
    """The store rejects this event permanently: its id exists, or a value does not fit its column."""
