"""What every format yields: one raw record with its line, or the reason why it could not be read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.common.sources.files.strict_json import find_repeated_key

Record = Mapping[str, Any]


class BadRow(ValueError):
    """A row that cannot be learned from; `reason` is one word to count by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Entry:
    """One raw record.

    Attributes:
        line: the one that it begins on.
        content: its text, for the rejects.
        fields: those, or its fault.
        may_hold_rows: a cell has several lines that look like rows, so a quote may have been left open.
    """

    line: int
    content: str
    fields: Record | BadRow
    may_hold_rows: bool = False


def check_object(value: Any) -> Record | BadRow:
    """Return a JSON value if it is an object whose keys are all different, else why it is no row."""
    if not isinstance(value, dict):
        return BadRow("broken_json", f"a {type(value).__name__} instead of an object")
    key = find_repeated_key(value)
    return value if key is None else BadRow("repeated_key", f"the key {key!r} is there twice")


def find_nul(text: str) -> BadRow | None:
    """Return the fault of a text with a NUL character, which is a sign of binary data."""
    if "\0" in text:
        return BadRow("not_text", "a NUL character (U+0000): binary data, or another encoding")
    return None


def is_encodable(text: str) -> bool:
    """Return whether every character of `text` exists in UTF-8: half of a surrogate pair does not."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def find_undecodable(text: str, encoding: str) -> str | None:
    """Return where `text`, decoded with `surrogateescape`, has a byte outside `encoding`, or None."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        place = len(text[: error.start].encode("utf-8", errors="surrogateescape")) + 1
        return f"byte 0x{byte:02x} at {place} is not {encoding}"
    return None


def show_bytes(text: str) -> str:
    """Return `text` with undecodable bytes and lone surrogates as their escapes, `\\xe9` and `\\ud800`."""
    shown = re.sub("[\udc80-\udcff]", lambda match: f"\\x{ord(match.group()) - 0xDC00:02x}", text)
    return shown.encode("utf-8", errors="backslashreplace").decode("utf-8")


def convert_to_text(value: Any) -> str:
    """Return a text as it is, and any other value as its JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def count(number: int, thing: str) -> str:
    """Return "1 row" or "2 rows"."""
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def shorten(value: Any, limit: int = 60) -> str:
    """Return the `repr` of a value, cut to `limit` characters."""
    return shorten_text(repr(value), limit)


def shorten_text(text: str, limit: int) -> str:
    """Return a text cut to `limit` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
