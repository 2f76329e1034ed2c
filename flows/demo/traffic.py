"""Generate the demo's traffic: requests to a smart home, of four kinds.

Each request has the answer that hassil's recogniser gives. `known` are phrasings the model was trained on,
`phrasing` are reserved ones (`collect.sources.reserved_share`), `wing` are known phrasings about rooms and
devices of a new wing of the house (`wing.csv`), and `german` are requests in German for the same intents.
Each kind is drawn from a few templates, the popular ones more often, as in real traffic.
"""

from __future__ import annotations

import csv
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TypeGuard, get_args

from stages.common.errors import InputError
from stages.common.params.loading import load_params
from stages.common.params.stages import HomeIntents
from stages.common.records import read_rows
from stages.common.sources.home_intents.collect import check_version
from stages.common.sources.home_intents.grammar import Grammar, Template, load_grammar, select_reserved_groups
from stages.common.sources.home_intents.lexicon import Device, Lexicon, read_lexicon
from stages.common.sources.home_intents.recognition import build_name_lists, find_best_answers, recognize
from stages.common.sources.home_intents.writer import Writer

Kind = Literal["known", "phrasing", "wing", "german"]
KINDS: tuple[Kind, ...] = get_args(Kind)

WING = Path(__file__).with_name("wing.csv")
SPARE_SHARE = 0.5  # more sentences are written than asked for: some do not name the new wing


@dataclass(frozen=True, slots=True)
class Request:
    """One request, and the right answer.

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
class TrafficModel:
    """What the requests depend on: the training data of the model that they are sent to.

    Attributes:
        version, seed, reserved_share: of the home_intents source.
        trained_groups: the groups of its training rows; None for all that are not reserved.
    """

    version: str
    seed: int
    reserved_share: float
    trained_groups: frozenset[str] | None = None


def read_traffic_model(root: Path = Path()) -> TrafficModel:
    """Read what the model at `root` was trained on from `params.yaml` and, if it exists, the split.

    Raises:
        InputError: `collect.sources` has no English home_intents source.
    """
    sources = load_params(root / "params.yaml").collect.sources
    source = next((source for source in sources if is_english_default(source)), None)
    if source is None:
        raise InputError(
            f"collect.sources in {root / 'params.yaml'} has no home_intents source in English, "
            "which the demo's requests come from",
            "put the packaged source back, or run the demo in another checkout",
        )
    split = root / "artifacts" / "split" / "train.parquet"
    trained_groups = frozenset(row.group for row in read_rows(split)) if split.is_file() else None
    return TrafficModel(source.version, source.seed, source.reserved_share, trained_groups)


def is_english_default(source: Any) -> TypeGuard[HomeIntents]:
    """Return whether a source of `collect.sources` is the packaged one, in English."""
    return isinstance(source, HomeIntents) and source.language == "en"


@cache
def _grammar(language: str) -> Grammar:
    return load_grammar(language)


@cache
def _lexicon(language: str) -> Lexicon:
    return read_lexicon(language)


@cache
def load_wing_lexicon() -> Lexicon:
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
    old, new = _lexicon("en"), load_wing_lexicon()
    return replace(old, areas=old.areas + new.areas, devices=old.devices + new.devices)


def select_templates(model: TrafficModel, kind: Kind) -> list[Template]:
    """Return the templates of a kind of request."""
    grammar = _grammar("de" if kind == "german" else "en")
    if kind == "german":
        return list(grammar.templates)
    reserved = select_reserved_groups(grammar, model.reserved_share, model.seed)
    if kind == "phrasing":
        return [template for template in grammar.templates if template.group in reserved]
    known = [
        template
        for template in grammar.templates
        if (
            template.group in model.trained_groups
            if model.trained_groups is not None
            else template.group not in reserved
        )
    ]
    return known if kind == "known" else [template for template in known if _can_name_the_wing(template)]


def _can_name_the_wing(template: Template) -> bool:
    """Return whether a template has a slot for a room or device, and the wing has one of its kind."""
    domains = {device.domain for device in load_wing_lexicon().devices}
    return bool({"area", "name"} & set(template.combination.split("_"))) and (
        not template.domains or bool(domains & set(template.domains))
    )


def write_traffic(
    model: TrafficModel,
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
        model: what the model was trained on.
        mix: how much of each kind, in any unit.
        count: of requests.
        seed: another one gives other sentences of the same phrasings.
        templates: phrasings of each kind that people use; some are far more popular than others.
        pool_seed: another one gives other phrasings.

    Raises:
        InputError: a kind has no template, as `phrasing` where none is reserved, or another
            version of the templates is installed.
    """
    check_version(model.version)
    total = sum(mix.values())
    if total <= 0:
        raise InputError(f"the mix of requests has no share above 0: {dict(mix)}", "give one kind a share")
    rng = random.Random(f"{seed}/traffic")
    drawn = Counter(rng.choices(list(mix), [share / total for share in mix.values()], k=count))
    requests = [
        request
        for kind in KINDS
        if drawn[kind]
        for request in _requests(model, kind, drawn[kind], seed, templates, pool_seed)
    ]
    rng.shuffle(requests)
    return requests


def _requests(
    model: TrafficModel, kind: Kind, count: int, seed: int, templates: int, pool_seed: int
) -> list[Request]:
    candidates = select_templates(model, kind)
    random.Random(f"{pool_seed}/{kind}").shuffle(candidates)
    # Which templates the pool has must not depend on this seed: they are tried with the pool's.
    pool = list(_usable(candidates, kind, pool_seed, templates))
    if not pool:
        fix = (
            "set collect.sources.0.reserved_share: 0.15 and train again" if kind == "phrasing" else "train it"
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
    lexicon = load_wing_lexicon() if kind == "wing" else _lexicon(grammar.language)
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
    """Return whether a request names the new wing, and means the same in the whole house."""
    wing, folded = load_wing_lexicon(), text.casefold()
    if not any(name in folded for name in (*wing.areas, *(device.name for device in wing.devices))):
        return False
    found = recognize(text, _grammar("en").intents, build_name_lists(_whole_house(), text))
    return find_best_answers(found) == {label}
