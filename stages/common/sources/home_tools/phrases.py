"""English phrases of the conversations, and which device a name is."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

from stages.common.sources.home_intents.lexicon import PERSON_MARK, Lexicon, read_lexicon

LANGUAGE = "en"
FOLDER = Path(__file__).parent / "phrase_data"


@cache
def read_phrases(name: str) -> tuple[dict[str, str], ...]:
    """Return the records of a file of phrases."""
    with (FOLDER / f"{name}.csv").open(encoding="utf-8", newline="") as lines:
        return tuple(csv.DictReader(lines))


@cache
def read_words() -> Lexicon:
    """Return the word lists that the requests are made of."""
    return read_lexicon(LANGUAGE)


def read_domain(name: str | None) -> str | None:
    """Return the domain of the device with this name; None if there is none, or no name."""
    return _domains().get(name) if name else None


@cache
def _domains() -> dict[str, str]:
    words = read_words()
    domains = {device.name: device.domain for device in words.devices}
    for device in words.devices:
        if PERSON_MARK in device.name:
            for person in words.people:
                domains[device.name.replace(PERSON_MARK, person.name)] = device.domain
    return domains


def list_names(domain: str) -> list[str]:
    """Return the devices of a domain whose names name no person."""
    return [d.name for d in read_words().devices if d.domain == domain and PERSON_MARK not in d.name]


def describe_place(area: str | None) -> str:
    """Return " in the kitchen", " in Tunde's room", " upstairs", or nothing."""
    if area is None:
        return ""
    if area in ("upstairs", "downstairs"):
        return f" {area}"
    return f" in {area}" if "'s " in area else f" in the {area}"


def describe_length(values: dict[str, int]) -> str:
    """Return "1 hour, 5 minutes and 30 seconds"."""
    units = ("hours", "minutes", "seconds")
    parts = [
        f"{values[unit]} {unit[: -1 if values[unit] == 1 else None]}" for unit in units if unit in values
    ]
    return join_words(parts)


def join_words(parts: list[str]) -> str:
    """Return "a, b and c"."""
    return " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)
