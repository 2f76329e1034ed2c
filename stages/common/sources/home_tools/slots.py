"""Fill the slots of a follow-up with values that differ from those of the call before it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from hassil.expression import ListReference
from hassil.intents import Intents
from hassil.util import normalize_whitespace

from stages.common.messages import ToolCall
from stages.common.sources.home_intents.grammar import expand
from stages.common.sources.home_intents.lexicon import PERSON_MARK
from stages.common.sources.home_tools.follow_ups import OPPOSITE, FollowUp
from stages.common.sources.home_tools.phrases import list_names, read_domain, read_phrases, read_words
from stages.common.sources.home_tools.tools import read_tools

WORDS_ONLY = ("undo", "state", "city", "person", "number")  # no argument of a call
Filled = tuple[str, Any]


def fill_follow_up(
    one: FollowUp, last: ToolCall | None, intents: Intents, rng: random.Random
) -> tuple[str, dict[str, Any]]:
    """Return one random wording of a follow-up, and the values of its slots."""
    words, slots = [], {}
    for part in expand(one.sentence.expression, intents, rng):
        if isinstance(part, ListReference):
            text, value = _choose(part.list_name, last.values if last else {}, rng)
            words.append(text)
            if part.list_name not in WORDS_ONLY:
                slots[part.slot_name] = value
        else:
            words.append(part)
    return normalize_whitespace(" ".join("".join(words).split())), slots


def _choose(name: str, last: Mapping[str, Any], rng: random.Random) -> Filled:
    return _CHOICES[name](last, rng)


def _text(list_texts: Callable[[Mapping[str, Any]], Sequence[str]], key: str = "") -> Callable[..., Filled]:
    """Return the choice of a text that is not the call's value of `key`."""

    def choose(last: Mapping[str, Any], rng: random.Random) -> Filled:
        text = rng.choice([text for text in list_texts(last) if text != last.get(key)])
        return text, text

    return choose


def _number(start: int, stop: int, step: int, *keys: str) -> Callable[..., Filled]:
    def choose(last: Mapping[str, Any], rng: random.Random) -> Filled:
        taken = [last.get(key) for key in keys]
        value = rng.choice([number for number in range(start, stop + 1, step) if number not in taken])
        return str(value), value

    return choose


def _list_devices(last: Mapping[str, Any]) -> Sequence[str]:
    """Return devices of the kind that the call is about: that of its device, or its kind."""
    return list_names(read_domain(last.get("name")) or last["kind"])


def _list_items(last: Mapping[str, Any]) -> Sequence[str]:
    name = "shopping_list_item" if last.get("list", "shopping") == "shopping" else "todo_list_item"
    return [p.text for p in read_words().phrases if p.list_name == name and PERSON_MARK not in p.text]


def _list_undoing(last: Mapping[str, Any]) -> Sequence[str]:
    """Return the words for the opposite state, about one device or several."""
    words = next(r["words"] for r in read_phrases("undo") if r["state"] == OPPOSITE[last["state"]])
    several = "kind" in last
    return [text.replace(" it", " them") if several else text for text in words.split("|")]


@cache
def _colors() -> tuple[str, ...]:
    schema = next(tool.parameters for tool in read_tools() if tool.name == "set_light")
    return tuple(schema["properties"]["color"]["enum"])


def _list_common(texts: Iterator[str] | Sequence[str]) -> list[str]:
    return [text for text in texts if PERSON_MARK not in text]


_CHOICES: dict[str, Callable[..., Filled]] = {
    "area": _text(lambda last: _list_common(read_words().areas), "area"),
    "name": _text(_list_devices, "name"),
    "percent": _number(5, 100, 5, "brightness", "percent"),
    "degrees": _number(15, 28, 1, "degrees"),
    "minutes": _number(2, 45, 1),
    "number": _number(2, 90, 1),
    "color": _text(lambda last: _colors(), "color"),
    "item": _text(_list_items, "item"),
    "list": _text(lambda last: list_names("todo"), "list"),
    "undo": _text(_list_undoing),
    "state": _text(lambda last: [last["state"]]),
    "city": _text(lambda last: list_names("weather")),
    "person": _text(lambda last: [person.name for person in read_words().people]),
}
