"""Redact personal data and secrets before anything is stored."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from stages.common.privacy.personal_data import RECOGNISERS, find_spans

# A replacement can expose another match, such as a number directly after it. Real texts need two passes; one
# built to need more has all its letters and digits masked.
MAX_PASSES = 5
MIN_DIGITS = 4  # a shorter number tells nothing
MAX_NAMED_CHARS = 256  # longer values are texts, which show by themselves what they are
# In the name of what is a secret or a person's by its name alone; the recognisers decide about the value.
TELLING = re.compile(
    r"pass|pw|key|secret|token|pin|auth|kennwort|contrase|parola|senha|wachtwoord|пароль|密码|ssn|social"
    r"|t[eé]l|phone|fon|fax|mobil|móvil|cell|handy|whatsapp|sms|portable|call|ring|dial|rufnummer"
    r"|电话|手机|電話",
    re.I,
)
# An object may have its name as a value: {"name": "password", "value": …}.
NAME_KEYS = ("name", "key", "field", "header", "param", "parameter", "variable", "label")
VALUE_KEYS = ("value", "values", "val", "content", "text", "data", "default", "const", "enum", "example")
QUOTES = re.compile(r"[\"'`]")  # in a value they would end it
WORD = re.compile(r"\w")
ESCAPE = re.compile(r"\\u00([2-7][0-9a-fA-F])")  # how JSON may write a plain character


def redact(text: str, kinds: Sequence[str] = tuple(RECOGNISERS)) -> str:
    """Replace personal data and secrets of `kinds` (keys of `RECOGNISERS`) by `[email]`, `[secret]`, ....

    Everything of the form goes, a documented address too: a store loses little by it. Linear in the text, and
    idempotent.
    """
    for _ in range(MAX_PASSES):
        before, text = text, _replace(text, kinds)
        if text == before:
            return text
    return WORD.sub("#", text)


def pseudonymise(name: str | None, kinds: Sequence[str] = tuple(RECOGNISERS)) -> str | None:
    """Return a hash of a name that is personal data, such as an e-mail address; other names stay.

    Requests of one user can still be grouped by the hash.
    """
    if name is None or redact(name, kinds) == name:
        return name
    return hash_name(name)


def hash_name(name: str) -> str:
    """Return the hash under which `pseudonymise` stores a name."""
    return f"hashed-{hashlib.blake2b(name.encode('utf-8', 'surrogatepass'), digest_size=8).hexdigest()}"


def _replace(text: str, kinds: Sequence[str]) -> str:
    """Replace all matches once; overlapping ones become one, of the kind of the first and longest."""
    spans = sorted(find_spans(text, kinds), key=lambda span: (span[0], -span[1], span[2]))
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
    """Redact the strings, numbers and keys in a JSON text, which stays valid JSON.

    A string that is itself JSON is redacted as such. Keys that become equal get a number. Without a match the
    text is returned unchanged, byte for byte. A text that is not JSON is redacted as plain text, escaped
    characters included.
    """
    changed = False

    def redact_part(part: str) -> str:
        nonlocal changed
        is_json = part.lstrip()[:1] in ("{", "[")
        redacted = redact_json(part, redact_text) if is_json else redact_text(part)
        changed = changed or redacted != part
        return redacted

    try:
        redacted = _redact_value(json.loads(text, object_pairs_hook=_Pairs), redact_part)
        return json.dumps(redacted, ensure_ascii=False) if changed else text
    except (ValueError, RecursionError):
        plain = ESCAPE.sub(lambda match: chr(int(match.group(1), 16)), text)
        redacted_plain = redact_text(plain)
        return text if redacted_plain == plain else redacted_plain


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with all its pairs: of two equal keys a dictionary would keep one."""


def _redact_value(value: Any, redact_part: Callable[[str], str], name: str = "") -> Any:
    """Redact a JSON value.

    Args:
        name: the nearest one around the value that may tell what it is; empty for none.
    """
    match value:
        case str():
            return _redact_named(name, value, redact_part(value), redact_part)
        case _Pairs():
            own = _find_own_name(value)
            return _name_apart(
                (key, redact_part(key), _redact_value(inner, redact_part, _name_of(key, own, name)))
                for key, inner in value
            )
        case [str(first), _] if TELLING.search(first):  # a header as some libraries have it
            return [redact_part(first), _redact_value(value[1], redact_part, first)]
        case list():
            return [_redact_value(inner, redact_part, name) for inner in value]
        case int() | float() if not isinstance(value, bool):
            plain = str(value)  # a card number may be a JSON number
            if len(plain) < MIN_DIGITS:
                return value
            redacted = redact_part(plain)
            return _redact_named(name, value, value if redacted == plain else redacted, redact_part)
    return value


def _find_own_name(pairs: _Pairs) -> str:
    """Return the telling name that an object has as a value; empty for none."""
    named = (inner for key, inner in pairs if key.casefold() in NAME_KEYS and isinstance(inner, str))
    return next((name for name in named if len(name) <= MAX_NAMED_CHARS and TELLING.search(name)), "")


def _name_of(key: str, own: str, around: str) -> str:
    """Return the nearest telling name of the value behind a key."""
    if TELLING.search(key):
        return key
    return own if own and key.casefold() in VALUE_KEYS else around


def _redact_named(name: str, value: Any, redacted: Any, redact_part: Callable[[str], str]) -> Any:
    """Redact a value that its name tells to be private, as for {"password": "…"}; others stay as redacted."""
    text = str(value)
    if not name or redacted != value or not MIN_DIGITS <= len(text) <= MAX_NAMED_CHARS:
        return redacted
    mark = '"' if isinstance(value, str) else ""
    before, entry = f"{name}: {mark}", f"{name}: {mark}{QUOTES.sub('_', text)}{mark}"
    both = redact_part(entry)
    if both in (entry, redact_part(name) + entry[len(name) :]):
        return value
    return both.removeprefix(before).removesuffix('"')


def _name_apart(entries: Iterable[tuple[str, str, Any]]) -> dict[str, Any]:
    """Return an object of (key, redacted key, value); keys that only redaction made equal are numbered.

    Of keys that were equal before, the last one counts, as for every reader of JSON.
    """
    built: dict[str, Any] = {}
    names: dict[str, str] = {}
    numbers: dict[str, int] = {}
    for key, redacted, value in entries:
        if key not in names:
            name = redacted
            while name in built:
                numbers[redacted] = numbers.get(redacted, 1) + 1
                name = f"{redacted} {numbers[redacted]}"
            names[key] = name
        built[names[key]] = value
    return built
