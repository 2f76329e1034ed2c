"""The call of a tool that an intent of Home Assistant is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stages.common.messages import ToolCall
from stages.common.sources.home_intents.grammar import Template
from stages.common.sources.home_tools.tools import make_call

# A tool has one argument for a place; the package tells rooms and floors apart.
PLACE = {"name": "name", "area": "area", "floor": "area"}
STARTED = {"start_hours": "hours", "start_minutes": "minutes", "start_seconds": "seconds"}
LENGTH = {"hours": "hours", "minutes": "minutes", "seconds": "seconds"}
SWITCHED = {"light", "switch", "fan", "media_player", "input_boolean", "climate", "scene", "script"}
ON_OFF = ("on", "off")
# What the two intents of switching mean, by the domain of the device.
STATES = {
    **dict.fromkeys(SWITCHED, ON_OFF),
    "cover": ("open", "closed"),
    "valve": ("open", "closed"),
    "lock": ("locked", "unlocked"),
}
SWITCHES = ("HassTurnOn", "HassTurnOff")
STATE_DOMAINS = {"light", "switch", "fan", "cover", "lock", "valve"}


@dataclass(frozen=True, slots=True)
class Rule:
    """How an intent becomes a call.

    Attributes:
        fixed: arguments that every such call has.
        arguments: the argument of each slot; a sentence with another slot is not used.
        is_opener: whether something can follow the request (`follow_ups`).
    """

    tool: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, str] = field(default_factory=lambda: PLACE)
    is_opener: bool = True


def _timer(action: str, arguments: Mapping[str, str], is_opener: bool = True) -> Rule:
    return Rule("timer", {"action": action}, {"name": "name", **arguments}, is_opener)


def _media(action: str, is_opener: bool = True, **arguments: str) -> Rule:
    return Rule("media", {"action": action}, {**PLACE, **arguments}, is_opener)


def _list(action: str, **fixed: str) -> Rule:
    return Rule("list", {"action": action, **fixed}, {"item": "item", "name": "list"}, action == "add")


_LIGHT = {**PLACE, "brightness": "brightness", "temperature": "kelvin", "color": "color"}
_KIND = {**PLACE, "domain": "domain", "device_class": "kind"}
RULES = {
    "HassTurnOn": Rule("set_state", {}, _KIND),
    "HassTurnOff": Rule("set_state", {}, _KIND),
    "HassGetState": Rule("get_state", {}, {**_KIND, "state": "state"}),
    "HassLightSet": Rule("set_light", {}, {**_LIGHT, "domain": "domain"}),
    "HassClimateSetTemperature": Rule("set_temperature", {}, {**PLACE, "temperature": "degrees"}),
    "HassClimateGetTemperature": Rule("get_temperature"),
    "HassStartTimer": _timer("start", LENGTH),
    "HassIncreaseTimer": _timer("add", LENGTH),
    "HassDecreaseTimer": _timer("remove", LENGTH),
    "HassPauseTimer": _timer("pause", STARTED),
    "HassUnpauseTimer": _timer("resume", STARTED),
    "HassTimerStatus": _timer("status", STARTED),
    "HassCancelTimer": _timer("cancel", STARTED, is_opener=False),
    "HassMediaSearchAndPlay": _media("play", search_query="query", media_class="class"),
    "HassMediaPause": _media("pause"),
    "HassMediaUnpause": _media("resume"),
    "HassMediaNext": _media("next"),
    "HassMediaPrevious": _media("previous"),
    "HassMediaPlayerMute": _media("mute"),
    "HassMediaPlayerUnmute": _media("unmute", is_opener=False),
    "HassSetVolume": _media("volume", volume_level="percent"),
    "HassSetVolumeRelative": _media("", volume_step="step"),
    "HassListAddItem": _list("add"),
    "HassListCompleteItem": _list("complete"),
    "HassListRemoveItem": _list("remove"),
    "HassShoppingListAddItem": _list("add", list="shopping"),
    "HassShoppingListCompleteItem": _list("complete", list="shopping"),
}
STEPS = {"up": "louder", "down": "quieter"}
# Combinations of slots for which the tools have no argument.
UNUSED = {
    "HassStartTimer": ("command",),
    "HassIncreaseTimer": ("area", "start"),
    "HassDecreaseTimer": ("area", "start"),
    "HassPauseTimer": ("area",),
    "HassUnpauseTimer": ("area",),
    "HassTimerStatus": ("area",),
    "HassCancelTimer": ("area",),
}


def is_usable(template: Template) -> bool:
    """Return whether the sentences of a template can be calls of the tools."""
    if template.intent not in RULES or any(
        word in template.combination for word in UNUSED.get(template.intent, ())
    ):
        return False
    domains = set(template.domains)
    if template.intent in SWITCHES:
        return domains <= set(STATES)
    if template.intent == "HassGetState":
        domain = template.data.slots.get("domain", "light")
        # One template is for sensors, too; what they measure is no state of the schema.
        return template.combination != "name_only" and domains | {domain} <= STATE_DOMAINS
    return True


def read_intent(template: Template, answer: str) -> ToolCall | None:
    """Return the call that a sentence's intent is; None if no tool can do it."""
    slots = json.loads(answer)
    rule = RULES[slots.pop("intent")]
    if not set(slots) <= set(rule.arguments):
        return None
    arguments = {**rule.fixed, **{rule.arguments[slot]: value for slot, value in slots.items()}}
    arguments.pop("class", None)  # the title is enough to find it
    if "step" in arguments:
        arguments["action"] = STEPS.get(str(arguments.pop("step")), "")
    if template.intent in SWITCHES:
        arguments["state"] = _read_state(template, arguments)
    domain = arguments.pop("domain", None)
    if domain and domain != "cover" and rule.tool != "set_light":
        arguments["kind"] = domain
    return make_call(rule.tool, arguments)


def _read_state(template: Template, arguments: Mapping[str, Any]) -> str:
    """Return the state that a request to switch asks for: to turn a lock on is to lock it."""
    domain = template.domains[0] if template.domains else arguments.get("domain", "light")
    return STATES[domain][SWITCHES.index(template.intent)]
