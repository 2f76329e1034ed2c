"""Read the outcomes of requests from the event store: failures, invalid answers, thumbs down, corrections."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from monitoring.traffic.answer_json import is_same_answer
from services.events import read_joined
from stages.common.tag import Tag

FIRST_SEARCH_S = 3600.0  # of the search back in time for a version's last requests; then four times as far
MAX_SEARCH_S = 366 * 86_400.0


@dataclass(frozen=True, slots=True)
class RequestOutcome:
    """The outcome of one request.

    Attributes:
        at: when it was received, unix s.
        assignment_key: the user, else the session, else the API key, else the request itself.
        valid: whether the answer had the required form; None if that was not checked.
        thumb_down_at, corrected_at: time of the first such feedback, unix s; None without any.
    """

    at: float
    assignment_key: str
    failed: bool
    valid: bool | None
    thumb_down_at: float | None
    corrected_at: float | None

    def known_at(self, time: float) -> RequestOutcome:
        """Return the outcome without feedback that came after `time`."""
        down, corrected = (
            at if at is not None and at <= time else None for at in (self.thumb_down_at, self.corrected_at)
        )
        return replace(self, thumb_down_at=down, corrected_at=corrected)


def read_outcomes(
    url: str, start: float, end: float, tag: str, role: str, limit: int | None = None
) -> Iterator[RequestOutcome]:
    """Yield the outcomes of a version's requests in [start, end), ordered by time, at most `limit`.

    Requests that were rejected (4xx) or closed by the client (499) are not outcomes of the model.

    Raises:
        InputError: there is no store, or it cannot be read.
    """
    version, found = Tag.parse(tag).version, 0
    for batch in read_joined(url, start, end):
        for row in batch.to_pylist():
            if row["version"] != version or row["role"] != role or 400 <= row["status"] < 500:
                continue
            yield make_outcome(row)
            found += 1
            if limit is not None and found >= limit:
                return


def read_last_outcomes(url: str, before: float, tag: str, count: int) -> list[RequestOutcome]:
    """Return the last `count` outcomes of a champion before a time; searches no farther back than needed."""
    back_s = FIRST_SEARCH_S
    while count:
        found = deque(read_outcomes(url, before - back_s, before, tag, "champion"), maxlen=count)
        if len(found) == count or back_s > MAX_SEARCH_S:
            return list(found)
        back_s *= 4
    return []


def make_outcome(row: dict[str, Any]) -> RequestOutcome:
    """Return the outcome of a row of `services.events.read_joined`."""
    down = [given["given_at"] for given in row["feedback"] if given["thumb"] == -1]
    corrected = [
        given["given_at"]
        for given in row["feedback"]
        if given["correction"] and not is_same_answer(row["answer"] or "", given["correction"])
    ]
    return RequestOutcome(
        at=row["received_at"],
        assignment_key=str(row["user"] or row["session"] or row["key_id"] or row["request_id"]),
        failed=row["status"] >= 500,
        valid=row["valid_output"],
        thumb_down_at=min(down, default=None),
        corrected_at=min(corrected, default=None),
    )


def resolve_store_url(root: Path, url: str) -> str:
    """Return the event store's URL, with a relative sqlite path taken from the checkout."""
    kind, slashes, path = url.partition(":///")
    if kind.startswith("sqlite") and slashes and not path.startswith("/"):
        return f"{kind}:///{root / path}"
    return url
