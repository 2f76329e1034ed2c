"""The date in a chat template: that of training, whenever a model is asked."""

from __future__ import annotations

import re
from datetime import datetime
from functools import lru_cache

# The day that Llama 3's template falls back to where it is given no other.
TEMPLATE_DAY = datetime(2024, 7, 26)

_CALL = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_OTHER_USE = re.compile(r"strftime_now(?!\s+is\b)")  # Llama 3's template asks whether it is defined


def writes_date(template: str) -> bool:
    """Return whether a chat template writes the date; if it does, that of `TEMPLATE_DAY`."""
    return "strftime_now" in template


@lru_cache(maxsize=16)
def fix_day(template: str) -> str:
    """Return a chat template with `TEMPLATE_DAY` where it asks for the date in a format of its own."""
    return _CALL.sub(lambda call: f"'{TEMPLATE_DAY.strftime(call[2])}'", template)


def writes_the_day_of_use(template: str) -> bool:
    """Return whether a chat template asks for the date in a way that `fix_day` cannot change.

    Servers that render the exported template would write the day on which they are asked.
    """
    return _OTHER_USE.search(fix_day(template)) is not None
