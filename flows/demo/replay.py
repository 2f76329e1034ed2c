"""Send requests to a service as users would, and give it their feedback."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from flows.demo.caller import USUAL_HABITS, Caller, Habits
from flows.demo.tool_replay import ToolCounts, converse
from flows.demo.tool_traffic import ToolConversation
from flows.demo.traffic import KINDS, Kind, Request

VISIT_REQUESTS = (3, 8)  # of one user in a row
LOOK_AHEAD = 40  # requests among which a visit finds related ones
REGULARS_PER_INTENT = 6  # users who mostly ask for the same things
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Visit:
    """The requests of one user in a row."""

    user: str
    session: str
    requests: tuple[Request, ...]

    @property
    def size(self) -> int:
        """The number of requests."""
        return len(self.requests)


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


def mix_evenly(
    visits: Sequence[Visit], conversations: Sequence[ToolConversation]
) -> list[Visit | ToolConversation]:
    """Return both in their order, the conversations evenly among the visits.

    So every window of the traffic has the same share of requests with tools.
    """
    placed = [*_find_middles(visits), *_find_middles(conversations)]
    return [one for _, one in sorted(placed, key=lambda pair: pair[0])]


def _find_middles(
    sources: Sequence[Visit] | Sequence[ToolConversation],
) -> Iterator[tuple[float, Visit | ToolConversation]]:
    """Yield each with the share of all their requests that come before its middle."""
    total, done = sum(one.size for one in sources), 0
    for one in sources:
        yield (done + one.size / 2) / total, one
        done += one.size


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
        scores: of the answered requests without tools; `version` is NAME:VERSION.
        corrections, thumbs_up: feedback on them that the service accepted.
        tools: what came of the conversations with tools.
    """

    asked: int
    failed: int
    failures: dict[str, int]
    scores: tuple[Score, ...]
    corrections: int
    thumbs_up: int
    seconds: float
    tools: ToolCounts

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

    answered: Counter[tuple[str, Kind, bool]] = field(default_factory=Counter)
    corrections: int = 0
    thumbs_up: int = 0
    tools: ToolCounts = field(default_factory=ToolCounts)


def replay(
    url: str,
    requests: Sequence[Request],
    *,
    conversations: Sequence[ToolConversation] = (),
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
        conversations: with tools, which come evenly among the requests.
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
    count = len(requests) + sum(one.size for one in conversations)
    caller = asyncio.run(
        _replay(
            url,
            mix_evenly(make_visits(requests, habits.users, seed), conversations),
            habits,
            concurrency,
            {"Authorization": f"Bearer {key}"} if key else {},
            max_tokens,
            tally,
            (lambda asked: on_progress(asked, count)) if on_progress else lambda _: None,
            should_stop or (lambda: False),
        )
    )
    pairs = sorted({(version, kind) for version, kind, _ in tally.answered})
    return ReplayResult(
        asked=caller.asked,
        failed=sum(caller.failures.values()),
        failures=dict(sorted(caller.failures.items())),
        scores=tuple(
            Score(version, kind, right + tally.answered[version, kind, False], right)
            for version, kind in pairs
            for right in (tally.answered[version, kind, True],)
        ),
        corrections=tally.corrections,
        thumbs_up=tally.thumbs_up,
        seconds=time.monotonic() - started,
        tools=tally.tools,
    )


async def _replay(
    url: str,
    waiting: Sequence[Visit | ToolConversation],
    habits: Habits,
    concurrency: int,
    headers: Mapping[str, str],
    max_tokens: int,
    tally: _Tally,
    on_asked: Callable[[int], None],
    should_stop: Callable[[], bool],
) -> Caller:
    """Send everything; return the caller with its counts."""
    import httpx

    queue = iter(waiting)

    async def ask_visits(caller: Caller) -> None:
        for one in queue:
            if should_stop():
                return
            if isinstance(one, ToolConversation):
                await converse(caller, one, habits, tally.tools)
                continue
            moods = random.Random(one.session)  # not shared: answers come in any order
            for request in one.requests:
                await _ask(caller, one, request, habits, moods, tally)

    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=TIMEOUT_S) as client:
        caller = Caller(client, max_tokens, on_asked)
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(ask_visits(caller))
    return caller


async def _ask(
    caller: Caller, visit: Visit, request: Request, habits: Habits, moods: random.Random, tally: _Tally
) -> None:
    mood = moods.random()
    answer = await caller.ask([{"role": "user", "content": request.text}], visit.user, visit.session)
    if answer is None:
        return
    right = is_right(answer["choices"][0]["message"]["content"], request.label)
    tally.answered[f"{answer['model']}:{answer['system_fingerprint']}", request.kind, right] += 1
    # No count is added to in the line that waits: others change it meanwhile.
    if right and mood < habits.thumbs_up:
        if await caller.confirm(answer["id"]):
            tally.thumbs_up += 1
    elif not right and mood < habits.corrected and await caller.correct(answer["id"], request.label):
        tally.corrections += 1


def is_right(text: str, label: str) -> bool:
    """Return whether an answer equals the label as JSON, whatever its whitespace and order."""
    try:
        return bool(json.loads(text) == json.loads(label))
    except ValueError:
        return text == label
