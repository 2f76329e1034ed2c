"""Schedules in `params.yaml`: cron expressions and time zones, checked before a scheduler meets them."""

from __future__ import annotations

import re
from typing import Annotated
from zoneinfo import ZoneInfo

from pydantic import AfterValidator

# Of each field: its name, lowest and highest number, and the names of its numbers.
FIELDS: tuple[tuple[str, int, int, tuple[str, ...]], ...] = (
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of the month", 1, 31, ()),
    ("month", 1, 12, ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")),
    ("day of the week", 0, 7, ("sun", "mon", "tue", "wed", "thu", "fri", "sat")),
)
PART = re.compile(r"(?:\*|([a-z0-9]+)(?:-([a-z0-9]+))?)(?:/([0-9]{1,3}))?")


def check_cron(text: str) -> str:
    """Return a cron expression of five fields.

    Raises:
        ValueError: it has other fields, or a number is out of its range.
    """
    fields = text.split()
    if len(fields) != len(FIELDS):
        raise ValueError(f"{text!r} is no cron expression: five fields, such as 0 3 * * 1")
    for field, (name, low, high, names) in zip(fields, FIELDS, strict=True):
        for part in field.lower().split(","):
            if not _is_part(part, low, high, names):
                raise ValueError(f"{text!r} is no cron expression: {field!r} is no {name} ({low} to {high})")
    return text


def check_timezone(text: str) -> str:
    """Return the name of a time zone.

    Raises:
        ValueError: there is none of that name.
    """
    try:
        ZoneInfo(text)
    except (ValueError, OSError, KeyError):
        raise ValueError(f"{text!r} is no time zone; write UTC or a name such as Europe/Berlin") from None
    return text


def _is_part(part: str, low: int, high: int, names: tuple[str, ...]) -> bool:
    found = PART.fullmatch(part)
    if found is None or (found[3] is not None and int(found[3]) < 1):
        return False
    ends = [low + names.index(end) if end in names else end for end in found.group(1, 2) if end is not None]
    numbers = [int(end) if str(end).isdigit() else high + 1 for end in ends]
    return all(low <= number <= high for number in numbers) and numbers == sorted(numbers)


Cron = Annotated[str, AfterValidator(check_cron)]
Timezone = Annotated[str, AfterValidator(check_timezone)]
