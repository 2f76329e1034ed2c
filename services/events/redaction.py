"""Redact personal data before anything is stored."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from stages.common.personal_data import PERSONAL_DATA

MAY_HOLD = re.compile(r"[@\d]")  # every kind of personal data has a digit or an @
# A replacement can expose another match, such as a number directly after it. Real texts need two passes; one
# built to need more has all its digits masked.
MAX_PASSES = 5


def redact(text: str, kinds: Sequence[str] = tuple(PERSONAL_DATA)) -> str:
    """Replace personal data of `kinds` (keys of `PERSONAL_DATA`) by `[email]`, `[phone]`, ....

    Linear in the text, and idempotent.
    """
    if not MAY_HOLD.search(text):
        return text
    for _ in range(MAX_PASSES):
        before, text = text, _replace(text, kinds)
        if text == before:
            return text
    return MAY_HOLD.sub("#", text)


def pseudonymise(name: str | None, kinds: Sequence[str] = tuple(PERSONAL_DATA)) -> str | None:
    """Return a hash of a name that is personal data, such as an e-mail address; other names stay.

    Requests of one user can still be grouped by the hash.
    """
    if name is None or redact(name, kinds) == name:
        return name
    return f"hashed-{hashlib.blake2b(name.encode('utf-8', 'surrogatepass'), digest_size=8).hexdigest()}"


def _replace(text: str, kinds: Sequence[str]) -> str:
    """Replace all matches once; overlapping ones become one, of the kind of the first and longest."""
    found = ((start, -end, kind) for kind in kinds for start, end in PERSONAL_DATA[kind](text))
    spans = [(start, -minus_end, kind) for start, minus_end, kind in sorted(found)]
    if not spans:
        return text
    pieces: list[str] = []
    done = 0
    for start, end, kind in spans:
        if start >= done:
            pieces += (text[done:start], f"[{kind}]")
        done = max(done, end)
    return "".join((*pieces, text[done:]))


def redact_json(text: str, redact_text: Callable[[str], str]) -> str:
    """Redact the strings and numbers in a JSON text, which stays valid JSON; keys do not change.

    Without a match the text is returned unchanged, byte for byte. A text that is not JSON is redacted as
    plain text.
    """
    if not MAY_HOLD.search(text):
        return text
    try:
        value = json.loads(text)
        redacted = _redact_value(value, redact_text)
        return text if redacted == value else json.dumps(redacted, ensure_ascii=False)
    except (ValueError, RecursionError):
        return redact_text(text)


def _redact_value(value: Any, redact_text: Callable[[str], str]) -> Any:
    match value:
        case str():
            return redact_text(value)
        case dict():
            return {key: _redact_value(inner, redact_text) for key, inner in value.items()}
        case list():
            return [_redact_value(inner, redact_text) for inner in value]
        case int() | float() if not isinstance(value, bool):
            plain = str(value)  # a card number may be a JSON number
            redacted = redact_text(plain)
            return value if redacted == plain else redacted
    return value
