"""Write over personal data before anything is stored."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from stages.common.personal_data import PERSONAL_DATA

MAY_HOLD = re.compile(r"[@\d]")  # every kind of personal data has a digit or an @
# What is written over may have hidden something: a number that began right behind it. Texts of
# people need two passes; one built to need more gets its digits masked after this many.
MAX_PASSES = 5


def redact(text: str, kinds: Sequence[str] = tuple(PERSONAL_DATA)) -> str:
    """Replace personal data of `kinds` (keys of `PERSONAL_DATA`) by `[email]`, `[phone]`, ....

    Linear in the text; redacting twice changes nothing more.
    """
    if not MAY_HOLD.search(text):
        return text
    for _ in range(MAX_PASSES):
        before, text = text, _replace(text, kinds)
        if text == before:
            return text
    return MAY_HOLD.sub("#", text)


def pseudonym(name: str | None, kinds: Sequence[str] = tuple(PERSONAL_DATA)) -> str | None:
    """Return a name as it is, or a hash in its place where it is personal data.

    An e-mail address as the name of a user is not kept, and the requests of one user still belong together.
    """
    if name is None or redact(name, kinds) == name:
        return name
    return f"hashed-{hashlib.blake2b(name.encode('utf-8', 'surrogatepass'), digest_size=8).hexdigest()}"


def _replace(text: str, kinds: Sequence[str]) -> str:
    """Replace what one look finds; of spans that overlap, the first and longest names all."""
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
    """Redact the strings and numbers inside of a JSON text, which stays JSON; keys stay as they are.

    A text in which nothing is found comes back byte for byte. A text that is no JSON is redacted as
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
            plain = str(value)  # a card's number may stand there as a number
            redacted = redact_text(plain)
            return value if redacted == plain else redacted
    return value
