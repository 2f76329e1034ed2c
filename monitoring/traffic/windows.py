"""Windows of production traffic, and the quarantine of corrupt events.

Watched are the exchanges that one version answered as champion, errors and refusals among them; shadows
and challengers are not. A window is [start, end) in unix s, and the windows of a version meet each other,
so that every exchange is in one of them, or came late.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.events import count_exchanges, read_joined, read_times
from stages.common.artifacts import atomic_write
from stages.common.params.loop import Reference, WindowSettings
from stages.common.tag import parse_version

if TYPE_CHECKING:
    import pyarrow as pa

WATCHED_ROLE = "champion"
HOUR_S = 3600.0
LAST_S = 253_402_300_799.0  # the end of the year 9999: no calendar names a later time of a wrong clock


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of exchanges that is judged as one.

    Attributes:
        start, end: [start, end) of `received_at`, unix s.
        rows: watched exchanges when the window was cut.
        name: UTC time of its first exchange to the millisecond, and the rows: names sort by time.
    """

    start: float
    end: float
    rows: int
    name: str


@dataclass(frozen=True, slots=True)
class QuarantinedEvent:
    """A corrupt event with its reason, one of a few that are counted."""

    request_id: str
    received_at: float
    reason: str


@dataclass(frozen=True, slots=True)
class Page:
    """Some exchanges of a window, as `services.events.read_joined` yields them, and what was quarantined."""

    batch: pa.RecordBatch
    quarantined: tuple[QuarantinedEvent, ...]


def find_reference_window(url: str, tag: str, settings: Reference, now: float) -> Window | None:
    """Return the first exchanges that a version answered as champion, or None while there are too few.

    Exchanges that share their time with the last one are in it too. Those after `now` (unix s) are not: the
    clock was wrong when they came, and no window would close before it is right again.

    Raises:
        InputError: the store cannot be read.
    """
    times = read_times(url, 0.0, math.nextafter(now, math.inf), parse_version(tag), WATCHED_ROLE)
    first = last = 0.0
    rows = 0
    for time in times:
        if rows >= settings.rows and time > last:
            break
        first, last, rows = (time if not rows else first), time, rows + 1
    if rows < settings.rows:
        return None
    return _window(first, math.nextafter(last, math.inf), rows, first)


def find_closed_windows(
    url: str, after: float, tag: str, settings: WindowSettings, now: float, limit: int
) -> list[Window]:
    """Return up to `limit` windows from `after` (the end of the window before) that nothing is added to.

    A window closes when its end is `settle_s` old. Windows by time in which nothing was asked are excluded.

    Raises:
        InputError: the store cannot be read.
    """
    settled = now - settings.settle_s
    times = read_times(url, after, math.nextafter(settled, math.inf), parse_version(tag), WATCHED_ROLE)
    if settings.kind == "count":
        windows = _by_count(times, after, settings.rows)
    else:
        windows = _by_time(times, after, settings.hours * HOUR_S, settled)
    return [window for window, _ in zip(windows, range(limit), strict=False)]


def _by_count(times: Iterator[float], after: float, wanted: int) -> Iterator[Window]:
    """Yield windows of `wanted` rows, or a few more where a time is shared: a cut is never inside of one."""
    start, first, last, rows = after, 0.0, 0.0, 0
    for time in times:
        if rows >= wanted and time > last:
            end = math.nextafter(last, math.inf)
            yield _window(start, end, rows, first)
            start, rows = end, 0
        if not rows:
            first = time
            start = start if start > 0.0 else time
        last, rows = time, rows + 1
    if rows >= wanted:
        yield _window(start, math.nextafter(last, math.inf), rows, first)


def _by_time(times: Iterator[float], after: float, length_s: float, settled: float) -> Iterator[Window]:
    """Yield windows of `length_s` that end by `settled`, counted from `after`, or from the first row."""
    origin, start, end, first, rows = after, 0.0, -math.inf, 0.0, 0
    for time in times:
        if time >= end:
            if rows:
                yield _window(start, end, rows, first)
            origin = origin if origin > 0.0 else time
            start, end = _span(time, origin, length_s)
            first, rows = time, 0
        if end > settled:
            return
        rows += 1
    if rows:
        yield _window(start, end, rows, first)


def _span(time: float, origin: float, length_s: float) -> tuple[float, float]:
    number = int((time - origin) // length_s)
    if origin + number * length_s > time:  # rounding of large times
        number -= 1
    elif origin + (number + 1) * length_s <= time:
        number += 1
    return origin + number * length_s, origin + (number + 1) * length_s


def _window(start: float, end: float, rows: int, first: float) -> Window:
    at = datetime.fromtimestamp(math.floor(min(first, LAST_S) * 1000) / 1000, UTC)
    return Window(start, end, rows, f"{at:%Y%m%dT%H%M%S}.{at.microsecond // 1000:03d}-{rows}")


def count_late_rows(url: str, window: Window, tag: str, counted: int | None = None) -> int:
    """Return how many watched exchanges of a window were stored after it was cut, or after `counted`.

    Raises:
        InputError: the store cannot be read.
    """
    now = count_exchanges(url, window.start, window.end, parse_version(tag), WATCHED_ROLE)
    return max(0, now - (window.rows if counted is None else counted))


def read_window(url: str, window: Window, tag: str, role: str = WATCHED_ROLE) -> Iterator[Page]:
    """Yield a window's watched exchanges with the feedback on them, in order; memory is bounded.

    Args:
        role: another one than the champion's, to look at a challenger's in the same way.

    Raises:
        InputError: the store cannot be read.
    """
    import pyarrow.compute as pc

    version = parse_version(tag)
    at_the_last_time: tuple[float, set[tuple[Any, ...]]] = (-math.inf, set())
    for batch in read_joined(url, window.start, window.end):
        watched = batch.filter(pc.and_(pc.equal(batch["version"], version), pc.equal(batch["role"], role)))
        quarantined: list[QuarantinedEvent] = []
        keep: list[bool] = []
        for row in watched.select(_CHECKED).to_pylist():
            reason = find_problem(row)
            if row["received_at"] != at_the_last_time[0]:
                at_the_last_time = row["received_at"], set()
            print_of_it = tuple(row[name] for name in _CHECKED if name != "request_id")
            if reason is None and print_of_it in at_the_last_time[1]:
                reason = "stored twice"
            at_the_last_time[1].add(print_of_it)
            keep.append(reason is None)
            if reason is not None:
                quarantined.append(QuarantinedEvent(row["request_id"], row["received_at"], reason))
        if quarantined:
            import pyarrow as pa

            watched = watched.filter(pa.array(keep, pa.bool_()))
        if watched.num_rows or quarantined:
            yield Page(watched, tuple(quarantined))


_CHECKED = [
    "request_id",
    "received_at",
    "user",
    "session",
    "messages",
    "parameters",
    "decisions",
    "status",
    "answer",
    "prompt_tokens",
    "completion_tokens",
    "queue_s",
    "first_token_s",
    "total_s",
    "mean_logprob",
]
_TIMES = ("queue_s", "first_token_s", "total_s")
MAX_TIME_S = 1e7  # four months: nothing waits so long, and sums of such times stay finite
_COUNTS = ("prompt_tokens", "completion_tokens")


def find_problem(row: Mapping[str, Any]) -> str | None:
    """Return why an exchange is corrupt, or None."""
    messages = _json(row["messages"])
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        return "messages are no list of roles and contents"
    asked = [message["content"] for message in messages if message["role"] == "user"]
    if not asked:
        return "no user message"
    if not isinstance(asked[-1], str):
        return "messages are no list of roles and contents"
    if not isinstance(_json(row["parameters"]), dict):
        return "parameters are no JSON object"
    decisions = _json(row["decisions"])
    if not isinstance(decisions, dict) or not all(map(_is_decision, decisions.values())):
        return "decisions are no JSON object of [allow, reason]"
    if any(value is not None and not 0.0 <= value < MAX_TIME_S for value in map(row.get, _TIMES)):
        return "a negative or impossible time"
    if any(row[name] < 0 for name in _COUNTS):
        return "a negative number of tokens"
    if not 100 <= row["status"] <= 599:
        return "a status that is none of HTTP"
    sure = row["mean_logprob"]
    if sure is not None and not -math.inf < sure <= 0.001:  # rounding may leave it just above 0
        return "an impossible log-probability"
    return None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str | list)
    )


def _is_decision(decision: Any) -> bool:
    return isinstance(decision, list) and len(decision) == 2 and isinstance(decision[0], bool)


def quarantine_to(
    path: Path,
    pages: Iterator[Page],
    counts: Counter[str],
    found_later: list[QuarantinedEvent] | None = None,
) -> Iterator[pa.RecordBatch]:
    """Yield the exchanges of `pages`; write quarantined events to `path` (JSON lines), count the reasons.

    The file appears when all was read, and only if an event was quarantined.

    Args:
        found_later: events that the reader of the yielded exchanges adds; they are written too.
    """
    later = [] if found_later is None else found_later

    def note(events: Iterable[QuarantinedEvent]) -> None:
        for event in events:
            lines.write(json.dumps(asdict(event)) + "\n")
            counts[event.reason] += 1

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as lines:
        for page in pages:
            note(page.quarantined)
            yield page.batch
            note(later)
            later.clear()
    if not counts:
        path.unlink()
