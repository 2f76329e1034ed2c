"""Which templates may meet in a conversation, so that a test has none that is trained on.

Each template of a request is in one group only: on its own, in one pair of parallel requests, or in one
family. A family is a set of requests and follow-ups that occur together and nowhere else; its conversations
are one group. A split by group therefore keeps each template on one side. Thanks are templates of families,
and so are half of the requests that no tool covers; the other half are conversations of their own.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

from stages.common.sources.home_intents.grammar import Template
from stages.common.sources.home_tools.follow_ups import (
    HOME,
    KINDS,
    LIST,
    MEDIA,
    NO_TOOL,
    THANKS,
    THEME_OF_TOOL,
    TIMER,
    FollowUp,
)
from stages.common.sources.home_tools.intents import RULES, is_usable

FAMILIES = {HOME: 24, TIMER: 6, MEDIA: 8, LIST: 3}
FAMILY_SHARE = 0.4  # of the templates of each tool
PAIR_SHARE = 0.15
ALONE_SHARE = 0.5  # of the templates that no tool covers


@dataclass(frozen=True, slots=True)
class Family:
    """Requests and follow-ups that occur only together."""

    name: str
    requests: tuple[Template, ...]
    follow_ups: tuple[FollowUp, ...]


@dataclass(frozen=True, slots=True)
class TemplatePlan:
    """All templates, each in one place.

    Attributes:
        single: templates of one request, by tool and group.
        pairs: templates of two parallel requests.
        uncovered: templates of requests that no tool covers.
    """

    single: Mapping[str, Mapping[str, tuple[Template, ...]]]
    pairs: tuple[tuple[Template, Template], ...]
    families: tuple[Family, ...]
    uncovered: tuple[FollowUp, ...]


def make_plan(templates: Iterable[Template], follow_ups: Sequence[FollowUp], seed: int) -> TemplatePlan:
    """Divide the templates; the same seed gives the same plan."""
    by_tool: dict[str, dict[str, list[Template]]] = defaultdict(lambda: defaultdict(list))
    for template in filter(is_usable, templates):
        by_tool[RULES[template.intent].tool][template.group].append(template)
    single: dict[str, dict[str, tuple[Template, ...]]] = {}
    paired: dict[str, list[Template]] = {}
    openers: dict[str, list[tuple[Template, ...]]] = defaultdict(list)
    for tool, groups in sorted(by_tool.items()):
        order = sorted(groups, key=lambda name: _shuffle_key(seed, name))
        opening = [name for name in order if RULES[groups[name][0].intent].is_opener]
        in_family = opening[: max(1, round(FAMILY_SHARE * len(order)))]
        rest = [name for name in order if name not in in_family]
        in_pair = rest[: round(PAIR_SHARE * len(order))]
        openers[THEME_OF_TOOL[tool]] += [tuple(groups[name]) for name in in_family]
        paired[tool] = [groups[name][0] for name in in_pair]
        single[tool] = {name: tuple(groups[name]) for name in rest if name not in in_pair}
    uncovered = [one for one in follow_ups if one.kind == NO_TOOL]
    alone = sorted(uncovered, key=lambda one: _shuffle_key(seed, one.text))
    alone = alone[: round(ALONE_SHARE * len(alone))]
    shared = [one for one in follow_ups if one not in alone]
    return TemplatePlan(
        single, tuple(_pair(paired, seed)), tuple(_make_families(openers, shared, seed)), tuple(alone)
    )


def _pair(paired: Mapping[str, Sequence[Template]], seed: int) -> Iterator[tuple[Template, Template]]:
    """Yield pairs of templates of two tools; each template is in one pair at most."""
    left = {tool: list(templates) for tool, templates in paired.items()}
    rng = random.Random(f"{seed}/pairs")
    while True:
        # The tools with most templates left, so that few remain without another tool's.
        tools = sorted((tool for tool in left if left[tool]), key=lambda tool: (-len(left[tool]), tool))
        if len(tools) < 2:
            return
        first, second = rng.sample(tools[:2], 2) if rng.random() < 0.5 else (tools[0], rng.choice(tools[1:]))
        yield left[first].pop(), left[second].pop()


def _make_families(
    openers: Mapping[str, Sequence[tuple[Template, ...]]], follow_ups: Sequence[FollowUp], seed: int
) -> Iterator[Family]:
    names = [(theme, number) for theme, count in FAMILIES.items() for number in range(count)]
    members: dict[tuple[str, int], list[FollowUp]] = {name: [] for name in names}
    by_kind: dict[str, list[FollowUp]] = defaultdict(list)
    for one in follow_ups:
        by_kind[one.kind].append(one)
    requests = {(theme, number): openers[theme][number :: FAMILIES[theme]] for theme, number in names}
    for kind, of_kind in sorted(by_kind.items()):
        places = [name for name in names if _can_have(requests[name], name[0], kind)]
        random.Random(f"{seed}/{kind}").shuffle(places)
        for number, one in enumerate(of_kind):
            members[places[number % len(places)]].append(one)
    for (theme, number), groups in requests.items():
        if groups and members[theme, number]:
            templates = tuple(template for group in groups for template in group)
            yield Family(f"{theme}/{number}", templates, tuple(members[theme, number]))


def _can_have(requests: Sequence[tuple[Template, ...]], theme: str, kind: str) -> bool:
    """Return whether a family with these requests can have follow-ups of a kind."""
    if kind in (THANKS, NO_TOOL):
        return True
    tool = KINDS[kind].tool
    return KINDS[kind].theme == theme and (
        tool is None or any(RULES[group[0].intent].tool == tool for group in requests)
    )


def _shuffle_key(seed: int, name: str) -> tuple[bytes, str]:
    return sha256(f"{seed}/place/{name}".encode()).digest(), name
