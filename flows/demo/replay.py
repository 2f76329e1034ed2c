"""Send requests to a service as users would, and give it their feedback."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from flows.demo.traffic import KINDS, Kind, Request

if TYPE_CHECKING:
    import httpx

VISIT_REQUESTS = (3, 8)  # of one user in a row
LOOK_AHEAD = 40  # requests among which a visit finds related ones
REGULARS_PER_INTENT = 6  # users who mostly ask for the same things
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Habits:
    """How users behave.

    Attributes:
        corrected: share of the wrong answers that get a thumbs down and the right answer.
        thumbs_up: share of the right answers that get a thumbs up.
        users: number of users.
    """

    corrected: float = 0.7
    thumbs_up: float = 0.3
    users: int = 60


USUAL_HABITS = Habits()


@dataclass(frozen=True, slots=True)
class Visit:
    """The requests of one user in a row."""

    user: str
    session: str
    requests: tuple[Request, ...]


def make_visits(requests: Sequence[Request], users: int, seed: int) -> list[Visit]:
    """Group requests into visits of users, roughly in their order.

    A visit has 3 to 8 requests in one language, of one kind and mostly for one intent, and comes from one of
    the users who usually ask for it. So requests are correlated within a visit, as in real logs, and windows
    of them vary more than windows of independent rows.
    """
    rng = random.Random(f"{seed}/visits")
    left = list(requests)
    dealt: list[Visit] = []
    while left:
        first = left.pop(0)
        size = rng.randint(*VISIT_REQUESTS)
        near = [request for request in left[:LOOK_AHEAD] if request.kind == first.kind]
        near.sort(key=lambda request: request.intent != first.intent)  # stable: else in their order
        taken = near[: size - 1]
        for request in taken:
            left.remove(request)
        regular = int.from_bytes(sha256(first.intent.encode()).digest()[:4], "big")
        number = (regular + rng.randrange(REGULARS_PER_INTENT)) % users
        user = f"{'de' if first.kind == 'german' else 'en'}-{number}"
        dealt.append(Visit(user, f"{user}-{seed}-{len(dealt)}", (first, *taken)))
    return dealt


@dataclass(frozen=True, slots=True)
class Score:
    """How often a version answered one kind of request correctly."""

    version: str
    kind: Kind
    asked: int
    right: int


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """The outcome of a replay.

    Attributes:
        asked: requests sent; failed: calls (requests and feedback) without status 200.
        failures: number by cause.
        scores: of the answered requests; `version` is NAME:VERSION.
        corrections, thumbs_up: feedback that the service accepted.
    """

    asked: int
    failed: int
    failures: dict[str, int]
    scores: tuple[Score, ...]
    corrections: int
    thumbs_up: int
    seconds: float

    @property
    def versions(self) -> dict[str, int]:
        """The number of requests that each version answered."""
        answered: Counter[str] = Counter()
        for score in self.scores:
            answered[score.version] += score.asked
        return dict(sorted(answered.items()))

    def accuracy(self, kinds: Sequence[Kind] = KINDS, version: str | None = None) -> float | None:
        """Return the share of right answers, of some kinds and one version; None without a request."""
        counted = [s for s in self.scores if s.kind in kinds and version in (None, s.version)]
        asked = sum(score.asked for score in counted)
        return sum(score.right for score in counted) / asked if asked else None


@dataclass(slots=True)
class _Tally:
    """Counts of a replay so far."""

    asked: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    answered: Counter[tuple[str, Kind, bool]] = field(default_factory=Counter)
    corrections: int = 0
    thumbs_up: int = 0


def replay(
    url: str,
    requests: Sequence[Request],
    *,
    habits: Habits = USUAL_HABITS,
    concurrency: int = 8,
    seed: int = 7,
    key: str | None = None,
    max_tokens: int = 128,
    on_progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> ReplayResult:
    """Send requests to a service as users would, and give it their feedback.

    Nothing is retried: every call without status 200 counts as failed.

    Args:
        url: of the service.
        requests: in their order of arrival.
        habits: of the users.
        concurrency: users at the same time; each waits for an answer before the next request.
        seed: of users and their feedback; a new one for each replay, or sessions are shared.
        key: an API key, if the service requires one.
        max_tokens: of an answer.
        on_progress: called with (asked, all) after each answer.
        should_stop: called before each visit; visits under way are finished.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)
    started, tally = time.monotonic(), _Tally()
    progress = (lambda: on_progress(tally.asked, len(requests))) if on_progress else lambda: None
    asyncio.run(
        _replay(
            url,
            make_visits(requests, habits.users, seed),
            habits,
            concurrency,
            {"Authorization": f"Bearer {key}"} if key else {},
            max_tokens,
            tally,
            progress,
            should_stop or (lambda: False),
        )
    )
    pairs = sorted({(version, kind) for version, kind, _ in tally.answered})
    return ReplayResult(
        asked=tally.asked,
        failed=sum(tally.failures.values()),
        failures=dict(sorted(tally.failures.items())),
        scores=tuple(
            Score(version, kind, right + tally.answered[version, kind, False], right)
            for version, kind in pairs
            for right in (tally.answered[version, kind, True],)
        ),
        corrections=tally.corrections,
        thumbs_up=tally.thumbs_up,
        seconds=time.monotonic() - started,
    )


async def _replay(
    url: str,
    waiting: Sequence[Visit],
    habits: Habits,
    concurrency: int,
    headers: Mapping[str, str],
    max_tokens: int,
    tally: _Tally,
    progress: Callable[[], None],
    should_stop: Callable[[], bool],
) -> None:
    import httpx

    queue = iter(waiting)

    async def ask_visits(client: httpx.AsyncClient) -> None:
        for visit in queue:
            if should_stop():
                return
            moods = random.Random(visit.session)  # not shared: answers come in any order
            for request in visit.requests:
                await _ask(client, visit, request, habits, moods, max_tokens, tally, progress)

    async with (
        httpx.AsyncClient(base_url=url, headers=headers, timeout=TIMEOUT_S) as client,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(concurrency):
            group.create_task(ask_visits(client))


async def _ask(
    client: httpx.AsyncClient,
    visit: Visit,
    request: Request,
    habits: Habits,
    moods: random.Random,
    max_tokens: int,
    tally: _Tally,
    progress: Callable[[], None],
) -> None:
    body = {
        "messages": [{"role": "user", "content": request.text}],
        "user": visit.user,
        "session": visit.session,
        "max_tokens": max_tokens,
    }
    mood = moods.random()
    answer = await _post(client, "/v1/chat/completions", body, tally)
    tally.asked += 1
    progress()
    if answer is None:
        return
    right = is_right(answer["choices"][0]["message"]["content"], request.label)
    tally.answered[f"{answer['model']}:{answer['system_fingerprint']}", request.kind, right] += 1
    feedback: dict[str, Any] = {"request_id": answer["id"]}
    if right and mood < habits.thumbs_up:
        if await _post(client, "/v1/feedback", {**feedback, "thumb": "up"}, tally) is not None:
            tally.thumbs_up += 1
    elif not right and mood < habits.corrected:
        feedback |= {"thumb": "down", "correction": request.label}
        if await _post(client, "/v1/feedback", feedback, tally) is not None:
            tally.corrections += 1


async def _post(
    client: httpx.AsyncClient, path: str, body: Mapping[str, Any], tally: _Tally
) -> dict[str, Any] | None:
    """Return the response of a call; count the failure if there is none."""
    import httpx

    try:
        answer = await client.post(path, json=dict(body))
        value: dict[str, Any] = answer.json()
    except httpx.HTTPError as error:
        tally.failures[f"{path} {type(error).__name__}"] += 1
        return None
    except ValueError:
        value = {}
    if answer.status_code != 200 or not value:
        tally.failures[f"{path} {answer.status_code}"] += 1
        return None
    return value


def is_right(text: str, label: str) -> bool:
    """Return whether an answer equals the label as JSON, whatever its whitespace and order."""
    try:
        return bool(json.loads(text) == json.loads(label))
    except ValueError:
        return text == label
