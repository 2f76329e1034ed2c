"""What people ask a smart home, day by day, and what they say of the answers: the demo's traffic.

Four kinds of requests, each with the answer that hassil's recogniser gives: `known` are phrasings
the model was taught, `phrasing` are reserved ones (`collect.sources.reserved_share`), `wing` are
known phrasings about rooms and devices of a new wing of the house (`demo_wing.csv`), and `german`
are requests in German for the same intents. People repeat themselves: each kind is drawn from a
few templates, the popular ones more often, and one person asks several related things in a row.
"""

from __future__ import annotations

import asyncio
import csv
import json
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from stages.common.errors import InputError
from stages.common.params.loading import load_params
from stages.common.params.stages import HomeIntents
from stages.common.records import read_rows
from stages.common.sources.home_intents.collect import check_version
from stages.common.sources.home_intents.grammar import Grammar, Template, load_grammar, select_reserved_groups
from stages.common.sources.home_intents.lexicon import Device, Lexicon, read_lexicon
from stages.common.sources.home_intents.recognition import build_name_lists, find_best_answers, recognize
from stages.common.sources.home_intents.writer import Writer

if TYPE_CHECKING:
    import httpx

Kind = Literal["known", "phrasing", "wing", "german"]
KINDS: tuple[Kind, ...] = get_args(Kind)

WING = Path(__file__).with_name("wing.csv")
SPARE_SHARE = 0.5  # more sentences are written than asked for: some do not name the new wing
VISIT_REQUESTS = (3, 8)  # of one person in a row
LOOK_AHEAD = 40  # requests among which a visit finds what belongs together
REGULARS_PER_INTENT = 6  # people who mostly ask for the same things
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Request:
    """What somebody asks, and the right answer.

    Attributes:
        label: the answer as compact JSON, as the rows of training have it.
        group: the template it was written from.
    """

    text: str
    label: str
    kind: Kind
    group: str

    @property
    def intent(self) -> str:
        """What it asks for."""
        return self.group.split("/", 1)[0]


@dataclass(frozen=True, slots=True)
class World:
    """What the model of a home was taught.

    Attributes:
        version, seed, reserved_share: of the source of its rows.
        taught: the groups of its training rows; None: all that are not reserved.
    """

    version: str
    seed: int
    reserved_share: float
    taught: frozenset[str] | None = None


def read_world(root: Path = Path()) -> World:
    """Read what the home at `root` was taught from its `params.yaml` and, once it is there, its split.

    Raises:
        InputError: `collect.sources` has no English home_intents.
    """
    sources = load_params(root / "params.yaml").collect.sources
    source = next((s for s in sources if isinstance(s, HomeIntents) and s.language == "en"), None)
    if source is None:
        raise InputError(
            f"{root / 'params.yaml'} has no source home_intents in English, and the demo's requests are such",
            "put the packaged default back into collect.sources",
        )
    split = root / "artifacts" / "split" / "train.parquet"
    taught = frozenset(row.group for row in read_rows(split)) if split.is_file() else None
    return World(source.version, source.seed, source.reserved_share, taught)


@cache
def _grammar(language: str) -> Grammar:
    return load_grammar(language)


@cache
def _lexicon(language: str) -> Lexicon:
    return read_lexicon(language)


@cache
def wing_lexicon() -> Lexicon:
    """Return the English lexicon with the rooms and devices of the new wing and no others."""
    with WING.open(encoding="utf-8", newline="") as lines:
        things = [Device(record["name"], record["domain"]) for record in csv.DictReader(lines)]
    return replace(
        _lexicon("en"),
        areas=tuple(thing.name for thing in things if thing.domain == "area"),
        devices=tuple(thing for thing in things if thing.domain != "area"),
    )


@cache
def _whole_house() -> Lexicon:
    old, new = _lexicon("en"), wing_lexicon()
    return replace(old, areas=old.areas + new.areas, devices=old.devices + new.devices)


def templates_of(world: World, kind: Kind) -> list[Template]:
    """Return the templates that requests of a kind can be written from."""
    grammar = _grammar("de" if kind == "german" else "en")
    if kind == "german":
        return list(grammar.templates)
    reserved = select_reserved_groups(grammar, world.reserved_share, world.seed)
    if kind == "phrasing":
        return [template for template in grammar.templates if template.group in reserved]
    known = [
        template
        for template in grammar.templates
        if (template.group in world.taught if world.taught is not None else template.group not in reserved)
    ]
    return known if kind == "known" else [template for template in known if _can_name_the_wing(template)]


def _can_name_the_wing(template: Template) -> bool:
    """Tell whether a room or a device can stand in a template, and the wing has one of its kind."""
    domains = {device.domain for device in wing_lexicon().devices}
    return bool({"area", "name"} & set(template.combination.split("_"))) and (
        not template.domains or bool(domains & set(template.domains))
    )


def traffic(
    world: World,
    mix: Mapping[Kind, float],
    count: int,
    seed: int,
    *,
    templates: int = 40,
    pool_seed: int = 7,
) -> list[Request]:
    """Write `count` requests, the kinds in the proportions of `mix` and in random order.

    The same arguments give the same requests everywhere.

    Args:
        world: what the model was taught.
        mix: how much of each kind, in any unit.
        count: of requests.
        seed: another one gives other sentences of the same phrasings.
        templates: phrasings of each kind that people use; some are far more popular than others.
        pool_seed: another one gives other phrasings.

    Raises:
        InputError: a kind has no template, as `phrasing` where none is reserved, or another
            version of the templates is installed.
    """
    check_version(world.version)
    total = sum(mix.values())
    if total <= 0:
        raise InputError(f"the mix of requests has no share above 0: {dict(mix)}", "give one kind a share")
    rng = random.Random(f"{seed}/traffic")
    drawn = Counter(rng.choices(list(mix), [share / total for share in mix.values()], k=count))
    requests = [
        request
        for kind in KINDS
        if drawn[kind]
        for request in _requests(world, kind, drawn[kind], seed, templates, pool_seed)
    ]
    rng.shuffle(requests)
    return requests


def _requests(
    world: World, kind: Kind, count: int, seed: int, templates: int, pool_seed: int
) -> list[Request]:
    candidates = templates_of(world, kind)
    random.Random(f"{pool_seed}/{kind}").shuffle(candidates)
    # Which templates the pool has must not hang on this seed's luck: they are tried with the pool's.
    pool = list(_usable(candidates, kind, pool_seed, templates))
    if not pool:
        fix = (
            "set collect.sources.0.reserved_share: 0.15 and train anew" if kind == "phrasing" else "train it"
        )
        raise InputError(f"there is no template for requests of the kind {kind!r}", fix)
    rng = random.Random(f"{seed}/{kind}")
    # Zipf's law, softened: the most popular of 40 phrasings is asked six times as often as the last.
    weights = [1 / (rank + 1) ** 0.5 for rank in range(len(pool))]
    wanted = Counter(rng.choices(range(len(pool)), weights, k=count))
    writer = _writer(kind, f"{seed}/{kind}")
    found: list[Request] = []
    for index, number in sorted(wanted.items()):
        own = list(_write(writer, pool[index], kind, number)) or list(
            _write(_writer(kind, f"{pool_seed}/pool/{kind}"), pool[index], kind, 1)
        )
        found += [own[n % len(own)] for n in range(number)]  # a short template has few sentences
    return found


def _usable(candidates: Sequence[Template], kind: Kind, pool_seed: int, templates: int) -> Iterator[Template]:
    """Yield the first templates that give a sentence."""
    found = 0
    groups: set[str] = set()
    for template in candidates:
        if found == templates:
            return
        writer = _writer(kind, f"{pool_seed}/pool/{kind}")
        if template.group not in groups and any(True for _ in _write(writer, template, kind, 1)):
            groups.add(template.group)
            found += 1
            yield template


def _writer(kind: Kind, name: str) -> Writer:
    grammar = _grammar("de" if kind == "german" else "en")
    lexicon = wing_lexicon() if kind == "wing" else _lexicon(grammar.language)
    # A number of its own: with the seed of training the sentences would be those of training.
    return Writer(grammar, lexicon, int.from_bytes(sha256(f"traffic/{name}".encode()).digest()[:8], "big"))


def _write(writer: Writer, template: Template, kind: Kind, count: int) -> Iterator[Request]:
    spare = int(count * SPARE_SHARE) + 2 if kind == "wing" else 0
    written = 0
    for text, label, _ in writer.write(template, count + spare):
        if written < count and (kind != "wing" or _is_about_the_wing(text, label)):
            written += 1
            yield Request(text, label, kind, template.group)


def _is_about_the_wing(text: str, label: str) -> bool:
    """Tell whether a request names the new wing, and means the same in the whole house."""
    wing, folded = wing_lexicon(), text.casefold()
    if not any(name in folded for name in (*wing.areas, *(device.name for device in wing.devices))):
        return False
    found = recognize(text, _grammar("en").intents, build_name_lists(_whole_house(), text))
    return find_best_answers(found) == {label}


@dataclass(frozen=True, slots=True)
class Habits:
    """How people are.

    Attributes:
        corrected: share of the wrong answers that get a thumb down and the right answer.
        thumbs_up: share of the right answers that get a thumb up.
        users: how many people ask.
    """

    corrected: float = 0.7
    thumbs_up: float = 0.3
    users: int = 60


USUAL_HABITS = Habits()


@dataclass(frozen=True, slots=True)
class Visit:
    """What one person asks in a row."""

    user: str
    session: str
    requests: tuple[Request, ...]


def visits(requests: Sequence[Request], users: int, seed: int) -> list[Visit]:
    """Deal requests to people, roughly in their order.

    A visit has 3 to 8 requests in one language, of one kind and mostly for one intent, and comes
    from one of those who usually ask for it: the requests of a visit are alike, as in real logs,
    and windows of them vary more than windows of independent rows.
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
    """How often a version was right about one kind of request."""

    version: str
    kind: Kind
    asked: int
    right: int


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What became of the requests.

    Attributes:
        asked: requests that were sent; failed: calls (of questions and feedback) without status 200.
        failures: how many by what went wrong.
        scores: of the answered requests; `version` is NAME:VERSION.
        corrections, thumbs_up: feedback that the service has taken.
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
        """Return how many requests each version answered."""
        answered: Counter[str] = Counter()
        for score in self.scores:
            answered[score.version] += score.asked
        return dict(sorted(answered.items()))

    def accuracy(self, kinds: Sequence[Kind] = KINDS, version: str | None = None) -> float | None:
        """Return the share of right answers, of some kinds and one version; None where none was asked."""
        counted = [s for s in self.scores if s.kind in kinds and version in (None, s.version)]
        asked = sum(score.asked for score in counted)
        return sum(score.right for score in counted) / asked if asked else None


@dataclass(slots=True)
class _Tally:
    """What a replay has seen so far."""

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
    """Ask a service all requests as people would, and give it their feedback.

    Nothing is tried again: every call that does not end with status 200 is counted as failed.

    Args:
        url: of the service.
        requests: in the order in which they come up.
        habits: of the people.
        concurrency: people who ask at the same time; each waits for an answer before the next question.
        seed: of who asks what and who gives feedback; another one for each replay, or sessions are shared.
        key: for the service, where it wants one.
        max_tokens: of an answer.
        on_progress: is told (asked, all) after each answer.
        should_stop: is asked before each visit; people who are at it finish theirs.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)
    started, tally = time.monotonic(), _Tally()
    progress = (lambda: on_progress(tally.asked, len(requests))) if on_progress else lambda: None
    asyncio.run(
        _replay(
            url,
            visits(requests, habits.users, seed),
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

    async def people(client: httpx.AsyncClient) -> None:
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
            group.create_task(people(client))


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
    """Return the answer of a call, or count why there is none."""
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
    """Tell whether an answer means what the label does: the same JSON, whatever its spaces and order."""
    try:
        return bool(json.loads(text) == json.loads(label))
    except ValueError:
        return text == label
