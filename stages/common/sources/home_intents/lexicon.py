"""The project's own words for what a template leaves open: people, rooms, devices, free text.

`stages/common/people.csv` serves every language; `lexicon_data/<language>/` has the rest. A name or text
with `{person}` in it belongs to somebody, and a person is dealt when it is used.
"""

from __future__ import annotations

import csv
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.common.errors import InputError

FOLDER = Path(__file__).parent / "lexicon_data"
PEOPLE = Path(__file__).parents[2] / "people.csv"
PERSON_MARK = "{person}"


@dataclass(frozen=True, slots=True)
class Person:
    """A given name, with the gender and the origin it is mostly given in."""

    name: str
    gender: str
    origin: str


@dataclass(frozen=True, slots=True)
class Device:
    """A thing with a name, and its Home Assistant domain."""

    name: str
    domain: str


@dataclass(frozen=True, slots=True)
class Phrase:
    """A text for a slot that takes any words; `kind` is the sort of medium a query names."""

    list_name: str
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Courtesy:
    """Words around a request that do not change it; some need one that begins with a verb."""

    before: str
    after: str
    verb_first: bool


@dataclass(frozen=True, slots=True)
class Lexicon:
    """All the words of one language.

    `verbs` are those a request begins with. `unnatural` find, in "Intent: sentence", what a
    template can understand and nobody says, such as "lights off in the top floor floor".
    """

    people: tuple[Person, ...]
    areas: tuple[str, ...]
    floors: tuple[str, ...]
    devices: tuple[Device, ...]
    phrases: tuple[Phrase, ...]
    courtesies: tuple[Courtesy, ...]
    verbs: frozenset[str]
    unnatural: tuple[re.Pattern[str], ...]


def read_lexicon(language: str, folder: Path = FOLDER) -> Lexicon:
    """Read the word lists of `language`.

    Raises:
        InputError: the language has none.
    """
    if not (folder / language).is_dir():
        have = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
        raise InputError(
            f"there are no word lists for language {language!r} (there are: {have})",
            f"write the CSV files that {folder / 'en'} has into {folder / language}",
        )
    own = folder / language
    return Lexicon(
        people=tuple(Person(r["name"], r["gender"], r["origin"]) for r in _records(PEOPLE)),
        areas=tuple(r["name"] for r in _records(own / "areas.csv")),
        floors=tuple(r["name"] for r in _records(own / "floors.csv")),
        devices=tuple(Device(r["name"], r["domain"]) for r in _records(own / "devices.csv")),
        phrases=tuple(Phrase(r["list"], r["kind"], r["text"]) for r in _records(own / "phrases.csv")),
        courtesies=tuple(
            Courtesy(r["before"], r["after"], r["verb_first"] == "yes")
            for r in _records(own / "courtesies.csv")
        ),
        verbs=frozenset(r["verb"] for r in _records(own / "verbs.csv")),
        unnatural=tuple(re.compile(r["pattern"]) for r in _records(own / "unnatural.csv")),
    )


def deal_people(people: Sequence[Person], rng: random.Random) -> Iterator[Person]:
    """Yield people for ever, every gender and origin equally often.

    Dealing from shuffled decks, not drawing, keeps the groups equal: a bias gate on the rows
    should find what the sources did, and not the luck of the draw.
    """
    cells: dict[tuple[str, str], list[Person]] = defaultdict(list)
    for person in people:
        cells[person.gender, person.origin].append(person)
    for members in cells.values():
        rng.shuffle(members)
    while True:
        order = sorted(cells)
        rng.shuffle(order)
        for cell in order:
            members = cells[cell]
            members.append(members.pop(0))
            yield members[-1]


def _records(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))
