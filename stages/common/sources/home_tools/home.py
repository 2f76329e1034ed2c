"""A home that carries out the calls of the tools, and returns results like those of the rows.

The same seed gives the same home. Rooms and devices exist once a call names them, since conversations name
any of the word lists; a few devices are missing, as in the rows.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from stages.common.sources.home_tools.phrases import list_names, read_domain
from stages.common.sources.home_tools.replies import CAN_MISS, MISSING, OK

MISSING_SHARE = 0.08  # of the devices
LENGTHS = {"hours": 3600, "minutes": 60, "seconds": 1}
STATES = {"lock": ("locked", "unlocked")}
STATES |= dict.fromkeys(("blind", "curtain", "window", "cover", "valve"), ("open", "closed"))
STEPS = {"louder": 10, "quieter": -10}
PLACES = 3  # unnamed devices of a kind in a room

Values = Mapping[str, Any]
Result = dict[str, Any]


class Home:
    """One home; `run` carries out a call, and `state` is what has been changed so far."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._things: dict[tuple[str, str], dict[str, Any]] = {}
        self._timers: dict[str, dict[str, Any]] = {}
        self._lists: dict[str, dict[str, str]] = {}

    @property
    def state(self) -> dict[str, Any]:
        """Everything that calls have set, as JSON values."""
        things = {f"{what} / {area}": dict(found) for (what, area), found in self._things.items() if found}
        return {
            "things": things,
            "timers": {name: dict(timer) for name, timer in self._timers.items()},
            "lists": {name: dict(items) for name, items in self._lists.items()},
        }

    def run(self, name: str, arguments: Values) -> Result:
        """Carry out a call whose arguments fit the schema of its tool, and return its result.

        Raises:
            KeyError: there is no such tool.
        """
        carry_out = _TOOLS[name]
        if name in CAN_MISS and "name" in arguments and self._is_missing(arguments):
            return MISSING
        return carry_out(self, arguments)

    def _is_missing(self, values: Values) -> bool:
        return self._draw("missing", values["name"], values.get("area", "")).random() < MISSING_SHARE

    def _draw(self, *about: str) -> random.Random:
        """Return the chance by which something of this home is as it is."""
        return random.Random("/".join((str(self.seed), *about)))

    def _thing(self, values: Values, kind: str) -> dict[str, Any]:
        """Return what has been set of the thing that a call is about; `kind` if it names none."""
        what = values.get("name") or values.get("kind") or kind
        return self._things.setdefault((what, values.get("area", "")), {})

    def _set_state(self, values: Values) -> Result:
        if "name" not in values and "kind" in values:
            for (what, area), thing in self._things.items():  # the whole kind: its devices, too
                if area == values.get("area", "") and read_domain(what) == values["kind"]:
                    thing.pop("state", None)
        self._thing(values, "home")["state"] = values["state"]
        return OK

    def _get_state(self, values: Values) -> Result:
        area = values.get("area", "")
        if "name" in values:
            return {"state": self._read_state(values["name"], area, values.get("state"))}
        kind = values.get("kind", "light")
        names = list_names(kind) or [f"{side} {kind}" for side in ("left", "right", "middle", "small", "big")]
        devices = self._draw("devices", kind, area).sample(names, min(PLACES, len(names)))
        wanted = values.get("state")
        states = {name: self._read_state(name, area, wanted, kind) for name in devices}
        return {"devices": [name for name, state in states.items() if wanted in (None, state)]}

    def _read_state(self, name: str, area: str, wanted: str | None, kind: str | None = None) -> str:
        """Return the state of a device: as it was set, as its kind was set, or as it has been before."""
        kind = kind or read_domain(name) or ""
        for key in ((name, area), (kind, area)):
            if "state" in self._things.get(key, {}):
                return str(self._things[key]["state"])
        pair = next((pair for pair in (*STATES.values(), ("on", "off")) if wanted in pair), None)
        return self._draw("state", name, area).choice(pair or STATES.get(kind, ("on", "off")))

    def _set_light(self, values: Values) -> Result:
        light = self._thing(values, "light")
        light |= {key: values[key] for key in ("brightness", "kelvin", "color") if key in values}
        return OK

    def _set_temperature(self, values: Values) -> Result:
        self._thing(values, "climate")["degrees"] = values["degrees"]
        return OK

    def _get_temperature(self, values: Values) -> Result:
        where = values.get("name") or values.get("area", "")
        halves = self._draw("temperature", where).randrange(30, 58)
        return {"temperature": halves / 2 if halves % 2 else halves // 2}

    def _timer(self, values: Values) -> Result:
        action, length = values["action"], sum(values.get(unit, 0) * n for unit, n in LENGTHS.items())
        if action == "start":
            self._timers[values.get("name") or _name_timer(length)] = {"seconds": length}
            return OK
        # Pausing and asking name a timer by its length; adding and removing have a length to add or remove.
        changes = action in ("add", "remove")
        name = values.get("name") or (_name_timer(length) if length and not changes else self._last_timer())
        running = self._draw("timer", name).randrange(60, 3000)
        timer = self._timers.setdefault(name, {"seconds": length if length and not changes else running})
        if action == "status":
            left = max(1, timer["seconds"] - self._draw("passed", name).randrange(1, 60))
            return {"minutes": left // 60, "seconds": left % 60}
        if changes:
            timer["seconds"] = max(0, timer["seconds"] + (length if action == "add" else -length))
        else:
            timer["action"] = action
        return OK

    def _last_timer(self) -> str:
        return next(reversed(self._timers), "timer")

    def _media(self, values: Values) -> Result:
        player, action = self._thing(values, "media_player"), values["action"]
        if action in STEPS:
            player["volume"] = min(100, max(0, player.get("volume", 50) + STEPS[action]))
        elif action == "volume":
            player["volume"] = values.get("percent")
        elif action in ("mute", "unmute"):
            player["muted"] = action == "mute"
        elif action in ("next", "previous"):
            player["track"] = player.get("track", 0) + (1 if action == "next" else -1)
        else:
            player["playing"] = action != "pause"
            if "query" in values:
                player["title"] = values["query"]
        return OK

    def _list(self, values: Values) -> Result:
        items = self._lists.setdefault(values.get("list", "shopping"), {})
        items[values["item"]] = values["action"]
        return OK


_TOOLS = {
    "set_state": Home._set_state,
    "get_state": Home._get_state,
    "set_light": Home._set_light,
    "set_temperature": Home._set_temperature,
    "get_temperature": Home._get_temperature,
    "timer": Home._timer,
    "media": Home._media,
    "list": Home._list,
}


def _name_timer(length: int) -> str:
    return f"{length} s"
