"""What a tool returns, and how the assistant tells it.

A result is drawn at random; the answer follows from call and result in one wording, so that a model can know
it. Unseen are only the words of the user.
"""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

from stages.common.messages import ToolCall, format_arguments
from stages.common.sources.home_tools.follow_ups import OPPOSITE
from stages.common.sources.home_tools.phrases import (
    describe_length,
    describe_place,
    join_words,
    list_names,
    read_phrases,
)

MISSING = {"error": "not found"}
OK = {"ok": True}
CAN_MISS = ("set_state", "get_state", "set_light", "set_temperature", "get_temperature", "media")
MAX_FOUND = 3


def draw_result(call: ToolCall, rng: random.Random, can_fail: bool = False) -> str:
    """Return the result of a call as JSON text; with `can_fail` the device may be missing."""
    values = call.values
    if can_fail and call.name in CAN_MISS and "name" in values:
        return format_arguments(MISSING)
    if call.name == "get_temperature":
        halves = rng.randrange(30, 58)
        return format_arguments({"temperature": halves / 2 if halves % 2 else halves // 2})
    if call.name == "get_state":
        return format_arguments(_draw_state(values, rng))
    if call.name == "timer" and values["action"] == "status":
        return format_arguments({"minutes": rng.randrange(1, 50), "seconds": rng.randrange(1, 60)})
    return format_arguments(OK)


def _draw_state(values: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    if "name" in values:
        return {"state": values["state"] if rng.random() < 0.6 else OPPOSITE[values["state"]]}
    kind = values["kind"]
    # Blinds and windows have no names in the word lists.
    names = list_names(kind) or [f"{side} {kind}" for side in ("left", "right", "middle", "small", "big")]
    return {"devices": rng.sample(names, rng.randrange(MAX_FOUND + 1))}


def answer_result(call: ToolCall, result: str) -> str:
    """Return the answer to a call and its result."""
    values, found = call.values, json.loads(result)
    if found == MISSING:
        return _say("missing", name=values["name"])
    place = describe_place(values.get("area"))
    if call.name == "get_state":
        return _answer_state(values, found)
    if call.name == "get_temperature":
        about = "get_temperature name" if "name" in values else "get_temperature"
        name = values.get("name", "")
        degrees = _shorten(found["temperature"])
        return _say(about, name=name[:1].upper() + name[1:], temperature=degrees, place=place)
    if call.name == "set_light":
        about = next(f"set_light {key}" for key in ("brightness", "kelvin", "color") if key in values)
        return _say(about, **values, what=_describe_target({"kind": "light", **values}))
    if call.name == "set_state":
        return _say("set_state", what=_describe_target(values), state=values["state"])
    if call.name == "set_temperature":
        return _say("set_temperature", degrees=_shorten(values["degrees"]), place=place)
    left = describe_length(found) if found != OK else ""
    length = describe_length(values) if call.name == "timer" and values["action"] in _LENGTHY else ""
    words = {"place": place, "length": length, "left": left, **values}
    return _say(f"{call.name} {values['action']}", **words)


_LENGTHY = ("start", "add", "remove")


def answer_in_words(kind: str) -> str:
    """Return the answer to thanks, or to a request that no tool covers."""
    return _say(kind)


def _answer_state(values: dict[str, Any], found: dict[str, Any]) -> str:
    state = values["state"]
    if "state" in found:
        return _say(
            "get_state yes" if found["state"] == state else "get_state no", state=state, found=found["state"]
        )
    if not found["devices"]:
        return _say("get_state none", state=state)
    devices = found["devices"]
    return _say("get_state some", state=state, count=len(devices), devices=join_words(devices))


def _describe_target(values: dict[str, Any]) -> str:
    what = values.get("name") or _severals()[values["kind"]]
    return f"{what}{describe_place(values.get('area'))}"


def _shorten(number: float) -> str:
    return f"{number:g}"


def _say(about: str, **words: Any) -> str:
    return _templates()[about].format(**words)


@cache
def _templates() -> dict[str, str]:
    return {record["of"]: record["template"] for record in read_phrases("answers")}


@cache
def _severals() -> dict[str, str]:
    return {record["kind"]: record["several"] for record in read_phrases("kinds")}
