"""Read the outcomes of requests from the event store: failures, invalid answers, thumbs down, corrections."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
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
        assignment_key: who asked: the API key with its user, else its session, else the key alone, else the
            request itself. Two keys may both have a user of one name.
        valid: whether the answer had the required form; None if that was not checked.
        thumb_down_at, corrected_at: time of the user's newest thumb or correction, unix s, if it is bad;
            None without any, and where the newest takes an older one back.
        key: the API key of the request, if there was one.
        thumbs, corrections: of the user, in order: the time, and whether it is bad.
    """

    at: float
    assignment_key: str
    failed: bool
    valid: bool | None
    thumb_down_at: float | None
    corrected_at: float | None
    key: str | None = None
    thumbs: tuple[tuple[float, bool], ...] = ()
    corrections: tuple[tuple[float, bool], ...] = ()

    def known_at(self, time: float) -> RequestOutcome:
        """Return the outcome without feedback that came after `time`."""
        down, corrected = (
            _newest_bad([one for one in given if one[0] <= time])
            if given
            else at
            if at is not None and at <= time
            else None
            for given, at in ((self.thumbs, self.thumb_down_at), (self.corrections, self.corrected_at))
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
    """Return the outcome of a row of `services.events.read_joined`.

    Feedback that came with another API key than the request is not the user's own, and does not count.
    """
    own = [given for given in row["feedback"] if given["key_id"] == row["key_id"]]
    own.sort(key=lambda given: float(given["given_at"]))
    thumbs = tuple((given["given_at"], given["thumb"] == -1) for given in own if given["thumb"] is not None)
    corrections = tuple(
        (given["given_at"], not is_same_answer(row["answer"] or "", given["correction"]))
        for given in own
        if given["correction"]
    )
    name = row["user"] or row["session"]
    user = f"{row['key_id'] or ''}/{name}" if name else row["key_id"] or row["request_id"]
    return RequestOutcome(
        at=row["received_at"],
        assignment_key=str(user),
        failed=row["status"] >= 500,
        valid=row["valid_output"],
        thumb_down_at=_newest_bad(thumbs),
        corrected_at=_newest_bad(corrections),
        key=row["key_id"],
        thumbs=thumbs,
        corrections=corrections,
    )


def _newest_bad(given: Sequence[tuple[float, bool]]) -> float | None:
    """Return the time of the newest feedback if it is bad."""
    return given[-1][0] if given and given[-1][1] else None


def resolve_store_url(root: Path, url: str) -> str:
    """Return the event store's URL, with a relative sqlite path taken from the checkout."""
    kind, slashes, path = url.partition(":///")
    if kind.startswith("sqlite") and slashes and not path.startswith("/"):
        return f"{kind}:///{root / path}"
    return url
