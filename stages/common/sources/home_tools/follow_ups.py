"""What can follow a request: templates by kind, and the call that each makes of the one before it.

A follow-up is about the latest call: "and the bedroom too" is that call with another room, and what it does
not mention stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from hassil.expression import Sentence
from hassil.parse_expression import parse_sentence

from stages.common.messages import ToolCall
from stages.common.sources.home_tools.phrases import read_domain, read_phrases
from stages.common.sources.home_tools.tools import make_call

Values = Mapping[str, Any]
OPPOSITE = {"on": "off", "off": "on", "open": "closed", "closed": "open"}
OPPOSITE |= {"locked": "unlocked", "unlocked": "locked"}
SETTERS = ("set_state", "set_light", "set_temperature")
GETTERS = ("get_state", "get_temperature")
LENGTHS = ("hours", "minutes", "seconds")
HOME, TIMER, MEDIA, LIST, ANY = "home", "timer", "media", "list", "any"
THEME_OF_TOOL = {**dict.fromkeys((*SETTERS, *GETTERS), HOME), "timer": TIMER, "media": MEDIA, "list": LIST}
# No call: an answer in words.
THANKS, NO_TOOL = "thanks", "no_tool"
# Devices that another one can take the place of.
REPLACEABLE = ("light", "switch", "fan", "media_player", "cover", "valve", "lock", "climate")
COUNTING = ("start", "add", "remove", "resume", "status")
PLAYING = ("play", "resume", "next", "previous", "volume", "louder", "quieter", "unmute")


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of follow-up.

    Attributes:
        theme: the tools that it is about.
        fits: whether it can follow a call.
        apply: the tool and arguments, from the call before and the values of the template's slots.
        tool: the only tool that it follows; None if there are several.
    """

    theme: str
    fits: Callable[[str, Values], bool]
    apply: Callable[[str, Values, Values], tuple[str, Values]]
    tool: str | None = None


@dataclass(frozen=True, slots=True)
class FollowUp:
    """One template of a kind."""

    kind: str
    text: str
    sentence: Sentence


def _has_place(tool: str, last: Values, tools: tuple[str, ...]) -> bool:
    return tool in tools and "area" in last


def _replace(tool: str, last: Values, slots: Values) -> tuple[str, Values]:
    return tool, {**last, **slots}


def _keep(values: Values, *keys: str) -> dict[str, Any]:
    return {key: values[key] for key in keys if key in values}


def _is_light(tool: str, last: Values) -> bool:
    return tool == "set_light" or (tool == "set_state" and last["state"] == "on" and _names_light(last))


def _names_light(last: Values) -> bool:
    return last.get("kind") == "light" or read_domain(last.get("name")) == "light"


def _set_light(tool: str, last: Values, slots: Values) -> tuple[str, Values]:
    return "set_light", {**slots, **_keep(last, "name", "area")}


def _narrow(tool: str, last: Values, slots: Values) -> tuple[str, Values]:
    return tool, {**{key: value for key, value in last.items() if key != "kind"}, **slots}


def _undo(tool: str, last: Values, _: Values) -> tuple[str, Values]:
    return tool, {**last, "state": OPPOSITE[last["state"]]}


def _read_timer(last: Values) -> dict[str, Any]:
    """Return which timer a call was about: its name, or the length by which it was called."""
    is_named_by_length = last["action"] in ("pause", "resume", "cancel", "status")
    return _keep(last, "name", *(LENGTHS if is_named_by_length else ()))


def _timer(action: str, *before: str) -> Kind:
    return Kind(
        TIMER,
        lambda tool, last: tool == "timer" and last["action"] in before,
        lambda tool, last, slots: (tool, {"action": action, **_read_timer(last)}),
    )


def _timer_length(action: str) -> Kind:
    return Kind(
        TIMER,
        lambda tool, last: (
            tool == "timer"
            and last["action"] in COUNTING
            and not set(_read_timer(last)).intersection(LENGTHS)
            and (action == "add" or last["action"] != "status")
        ),
        lambda tool, last, slots: (tool, {"action": action, **_keep(last, "name"), **slots}),
    )


def _media(action: str, *before: str) -> Kind:
    return Kind(
        MEDIA,
        lambda tool, last: tool == "media" and last["action"] in before,
        lambda tool, last, slots: (tool, {"action": action, **slots, **_keep(last, "name", "area")}),
    )


def _list(action: str | None) -> Kind:
    return Kind(
        LIST,
        lambda tool, last: tool == "list" and last["action"] == "add",
        lambda tool, last, slots: (tool, {**last, **({"action": action} if action else {}), **slots}),
    )


KINDS = {
    "also_area": Kind(
        HOME, lambda tool, last: _has_place(tool, last, SETTERS) and "name" not in last, _replace
    ),
    "ask_area": Kind(
        HOME, lambda tool, last: _has_place(tool, last, GETTERS) and "name" not in last, _replace
    ),
    "not_area": Kind(HOME, lambda tool, last: _has_place(tool, last, SETTERS + GETTERS), _replace),
    "not_name": Kind(HOME, lambda tool, last: read_domain(last.get("name")) in REPLACEABLE, _replace),
    "only_name": Kind(
        HOME,
        lambda tool, last: (
            tool == "set_state" and last.get("kind") in ("light", "fan", "lock") and "name" not in last
        ),
        _narrow,
    ),
    "brightness": Kind(HOME, _is_light, _set_light),
    "color": Kind(HOME, _is_light, _set_light),
    "degrees": Kind(HOME, lambda tool, last: tool == "set_temperature", _replace, tool="set_temperature"),
    "undo": Kind(
        HOME,
        lambda tool, last: tool == "set_state" and read_domain(last.get("name")) not in ("scene", "script"),
        _undo,
    ),
    "ask_temperature": Kind(
        HOME,
        lambda tool, last: _has_place(tool, last, (*SETTERS, "get_state")),
        lambda tool, last, slots: ("get_temperature", _keep(last, "area")),
    ),
    "ask_state": Kind(
        HOME,
        lambda tool, last: tool == "set_state" and read_domain(last.get("name")) in REPLACEABLE,
        lambda tool, last, slots: ("get_state", last),
    ),
    "timer_more": _timer_length("add"),
    "timer_less": _timer_length("remove"),
    "timer_pause": _timer("pause", *COUNTING),
    "timer_resume": _timer("resume", "pause"),
    "timer_cancel": _timer("cancel", *COUNTING, "pause"),
    "timer_left": _timer("status", "start", "add", "remove", "pause", "resume"),
    "volume": _media("volume", *PLAYING),
    "louder": _media("louder", *PLAYING),
    "quieter": _media("quieter", *PLAYING),
    "media_pause": _media("pause", *PLAYING),
    "media_resume": _media("resume", "pause"),
    "media_next": _media("next", *PLAYING),
    "media_previous": _media("previous", *PLAYING),
    "media_mute": _media("mute", *PLAYING),
    "media_unmute": _media("unmute", "mute"),
    "and_item": _list(None),
    "remove_again": _list("remove"),
    "check_off": _list("complete"),
    "other_list": _list(None),
}


@cache
def read_follow_ups() -> tuple[FollowUp, ...]:
    """Return the templates of all kinds, in the order of their file."""
    return tuple(
        FollowUp(record["kind"], record["template"], parse_sentence(record["template"]))
        for record in read_phrases("follow_ups")
    )


def follow(kind: str, call: ToolCall, slots: Values) -> ToolCall | None:
    """Return the call that a follow-up makes of the one before it; None if it changes nothing."""
    tool, arguments = KINDS[kind].apply(call.name, call.values, slots)
    made = make_call(tool, arguments)
    return made if made != call else None


def can_follow(kind: str, call: ToolCall) -> bool:
    """Return whether a follow-up of this kind makes sense after a call."""
    return kind in (THANKS, NO_TOOL) or KINDS[kind].fits(call.name, call.values)
