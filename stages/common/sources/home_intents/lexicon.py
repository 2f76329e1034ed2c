"""Values for the slots of the templates: people, rooms, devices, free text.

`stages/common/privacy/people.csv` is for every language; `lexicon_data/<language>/` has the rest. In a name
or text with `{person}`, a person's name takes that place when it is used.
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
PEOPLE = Path(__file__).parents[2] / "privacy" / "people.csv"
PERSON_MARK = "{person}"


@dataclass(frozen=True, slots=True)
class Person:
    """A given name, with the gender and the origin in which it is most common."""

    name: str
    gender: str
    origin: str


@dataclass(frozen=True, slots=True)
class Device:
    """A device with its name and its Home Assistant domain."""

    name: str
    domain: str


@dataclass(frozen=True, slots=True)
class Phrase:
    """A text for a slot that accepts any words; `kind` is the kind of media that it names."""

    list_name: str
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Courtesy:
    """Polite words around a request; some need a request that begins with a verb."""

    before: str
    after: str
    verb_first: bool


@dataclass(frozen=True, slots=True)
class Lexicon:
    """All word lists of one language.

    `verbs` begin a request. `unnatural` are patterns that match, in "Intent: sentence", what a template
    accepts but no speaker uses, such as "lights off in the top floor floor".
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
    """Yield people without end, every gender and origin equally often.

    Shuffled decks instead of independent draws keep the groups equal: check_bias should find a bias of the
    sources, not of the random draw.
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
