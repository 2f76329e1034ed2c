import csv
import random
import re
from collections import Counter
from itertools import islice

import pytest

from stages.common.errors import InputError
from stages.common.sources.home_intents.lexicon import FOLDER, PERSON_MARK, Person, deal_people, read_lexicon

LANGUAGES = ("en", "de")
LEXICON = read_lexicon("en")
every_language = pytest.mark.parametrize("language", LANGUAGES)


def test_every_gender_of_every_origin_has_equally_many_people():
    cells = Counter((person.gender, person.origin) for person in LEXICON.people)
    assert {gender for gender, _ in cells} == {"female", "male", "neutral"}
    assert len(cells) == 3 * len({person.origin for person in LEXICON.people})
    assert set(cells.values()) == {10}


def test_no_name_stands_for_two_people():
    names = [person.name.casefold() for person in LEXICON.people]
    assert len(names) == len(set(names))


def test_dealing_people_keeps_the_groups_equal():
    dealt = list(islice(deal_people(LEXICON.people, random.Random(1)), 3000))
    cells = Counter((person.gender, person.origin) for person in dealt)
    assert set(cells.values()) == {100}
    assert set(Counter(person.name for person in dealt).values()) == {10}


def test_dealing_begins_anew_with_another_seed():
    people = [
        Person(name, "neutral", origin) for name, origin in (("A", "x"), ("B", "x"), ("C", "y"), ("D", "z"))
    ]
    orders = {tuple(p.name for p in islice(deal_people(people, random.Random(seed)), 8)) for seed in range(5)}
    assert len(orders) > 1


@every_language
def test_no_device_has_the_name_of_a_room_in_it(language):
    # "turn on attic fan" would mean the fan in the attic as well as the attic fan.
    lexicon = read_lexicon(language)
    places = re.compile("|".join(rf"\b{re.escape(place)}\b" for place in (*lexicon.areas, *lexicon.floors)))
    assert [device.name for device in lexicon.devices if places.search(device.name)] == []


@every_language
def test_no_device_is_of_two_kinds(language):
    names = [device.name for device in read_lexicon(language).devices]
    assert len(names) == len(set(names))


@every_language
def test_every_kind_of_device_can_belong_to_somebody_but_the_weather(language):
    devices = read_lexicon(language).devices
    owned = {device.domain for device in devices if PERSON_MARK in device.name}
    assert {device.domain for device in devices} - owned == {"weather"}


def test_every_language_names_the_same_kinds_of_devices_and_texts():
    first, *others = map(read_lexicon, LANGUAGES)
    for other in others:
        assert {device.domain for device in other.devices} == {device.domain for device in first.devices}
        assert {(p.list_name, p.kind) for p in other.phrases} == {
            (p.list_name, p.kind) for p in first.phrases
        }


@every_language
def test_every_unnatural_pattern_finds_its_example(language):
    with (FOLDER / language / "unnatural.csv").open(encoding="utf-8", newline="") as lines:
        examples = [record["example"] for record in csv.DictReader(lines)]
    for pattern, example in zip(read_lexicon(language).unnatural, examples, strict=True):
        assert pattern.search(example), example


def test_an_unknown_language_names_the_known_ones():
    with pytest.raises(InputError, match=r"no word lists for language 'xx' \(there are: de, en\)"):
        read_lexicon("xx")
