"""JSON documents (an array, or an object with one array of objects), read a value at a time.

A document of any size takes the memory of its largest value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from stages.common.errors import InputError
from stages.common.sources.files.encodings import open_text
from stages.common.sources.files.entries import Entry, check_object
from stages.common.sources.files.strict_json import keep_repeated
from stages.common.sources.files.tools.calls import CALL_NAMES, is_call_list
from stages.common.sources.files.tools.schemas import TOOL_NAMES, is_tool_list

CHAT_KEYS = ({"role", "content"}, {"from", "value"})
WHITESPACE = " \t\r\n"
DECODER = json.JSONDecoder(object_pairs_hook=keep_repeated)
NOT_DECODED = re.compile("[\udc80-\udcff]")  # a byte that `surrogateescape` kept
READ_CHARS = 1 << 20
MAX_VALUE_CHARS = 100_000_000  # of one row; a longer one is a quote that is not closed
CUT_CHARS = 16  # before the end of what was read, a value that ends or is broken may go on


class _Document:
    """The text of a document from its next value on, and where that is in the file."""

    def __init__(self, path: Path, encoding: str, file: IO[str]) -> None:
        self.path, self.line = path, 1
        self._encoding, self._file = encoding, file
        self._text, self._place = "", 0
        self._offset = 0  # characters of the file before `_text`
        self._line_offset = 0  # characters before the line
        self._read_more()
        self._text = self._text.removeprefix("\ufeff")

    def peek(self) -> str:
        """Return the next character that is not blank, "" at the end, and move to it."""
        while True:
            place = self._place
            while place < len(self._text) and self._text[place] in WHITESPACE:
                place += 1
            self._move(place)
            if place < len(self._text):
                return self._text[place]
            if not self._read_more():
                return ""

    def take(self, sign: str) -> bool:
        """Return whether the next character is this one, and move behind it."""
        if self.peek() != sign:
            return False
        self._move(self._place + 1)
        return True

    def take_value(self) -> tuple[Any, str]:
        """Return the next value with its text, and move behind it.

        Raises:
            InputError: it is broken, or longer than `MAX_VALUE_CHARS`.
        """
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                if self._may_go_on(error) and self._read_more():
                    continue
                raise self.report(error.msg, error.pos) from None
            except (RecursionError, ValueError) as error:  # nested too deeply; a number of 5,000 digits
                raise self.report(str(error), self._place) from None
            if end >= len(self._text) - CUT_CHARS and self._read_more():  # of "1.5e3" only "1" may be read
                continue
            text = self._text[self._place : end]
            self._move(end)
            return value, text

    def report(self, message: str, place: int | None = None) -> InputError:
        """Return the error that the document is broken, here or at a place of what was read."""
        line, column = self._locate(self._place if place is None else place)
        return InputError(
            f"{self.path}:{line}: broken JSON: {message} at character {column}",
            "correct that line; rows of a file with one object a line (.jsonl) can be rejected one by one",
        )

    def _locate(self, place: int) -> tuple[int, int]:
        """Return the line and the column, both from 1, of a place in `_text` behind the current one."""
        last = self._text.rfind("\n", self._place, place)
        start = self._line_offset if last < 0 else self._offset + last + 1
        return self.line + self._text.count("\n", self._place, place), self._offset + place - start + 1

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        """Return whether an error may be that of a value of which the end is not read yet."""
        near_end = error.pos >= len(self._text) - CUT_CHARS or error.msg.startswith("Unterminated string")
        return near_end and len(self._text) - self._place < MAX_VALUE_CHARS

    def _move(self, place: int) -> None:
        if lines := self._text.count("\n", self._place, place):
            self.line += lines
            self._line_offset = self._offset + self._text.rfind("\n", self._place, place) + 1
        self._place = place

    def _read_more(self) -> bool:
        """Read `READ_CHARS` more, or as much again as the value has so far; return whether there was any."""
        rest = self._text[self._place :]
        more = self._file.read(max(READ_CHARS, len(rest)))
        if not more:
            return False
        self._offset += self._place
        self._text, self._place = rest + more, 0
        if undecodable := NOT_DECODED.search(self._text, len(rest)):
            line, column = self._locate(undecodable.start())
            raise InputError(
                f"{self.path}:{line}: byte 0x{ord(undecodable[0]) - 0xDC00:02x} at character {column} is not "
                f"{self._encoding}",
                "set `encoding` in its entry of collect.sources",
            )
        return True


def read_json(path: Path, encoding: str, records_key: str | None = None) -> Iterator[Entry]:
    """Yield the objects of a JSON document, each with the line it begins on.

    Args:
        records_key: the key of the array; needed only where an object has several.

    Raises:
        InputError: the document is broken (named with its line), or it is unclear which array has the rows.
    """
    with open_text(path, encoding, newline="") as file:
        document = _Document(path, encoding, file)
        first = document.peek()
        if first == "[":
            yield from map(_to_entry, _read_elements(document))
            _check_end(document)
            return
        if first == "{":
            arrays = _find_arrays(document)
        elif first:
            raise InputError(
                f"{path} is neither a JSON array nor an object", "write one JSON object a line (.jsonl)"
            )
        else:
            return
    chosen = _choose_array(path, arrays, records_key)
    with open_text(path, encoding, newline="") as file:
        document = _Document(path, encoding, file)
        document.peek()
        if chosen is None:  # the object is a row
            line = document.line
            yield _to_entry((line, *document.take_value()))
            return
        for place, _ in enumerate(_read_keys(document)):
            if place == chosen:
                yield from map(_to_entry, _read_elements(document))
                return
            _skip_value(document)


def _to_entry(element: tuple[int, Any, str]) -> Entry:
    line, value, text = element
    return Entry(line, text, check_object(value))


def _read_elements(document: _Document) -> Iterator[tuple[int, Any, str]]:
    """Yield line, value and text of each element of the array that comes next."""
    document.take("[")
    if document.take("]"):
        return
    while True:
        document.peek()
        line = document.line
        yield (line, *document.take_value())
        if document.take("]"):
            return
        if not document.take(","):
            raise document.report("Expecting ',' or ']'")


def _read_keys(document: _Document) -> Iterator[str]:
    """Yield each key of the object that comes next; the caller reads its value."""
    document.take("{")
    if document.take("}"):
        return
    while True:
        if document.peek() != '"':
            raise document.report("Expecting property name enclosed in double quotes")
        key, _ = document.take_value()
        if not document.take(":"):
            raise document.report("Expecting ':' delimiter")
        yield key
        if document.take("}"):
            return
        if not document.take(","):
            raise document.report("Expecting ',' or '}'")


def _skip_value(document: _Document) -> None:
    if document.peek() != "[":
        document.take_value()
        return
    for _ in _read_elements(document):
        pass


def _find_arrays(document: _Document) -> dict[str, tuple[int, bool] | None]:
    """Return the place of each array in the object and whether its elements are rows; None for other values.

    Raises:
        InputError: the object is broken, or something comes after it.
    """
    found: dict[str, tuple[int, bool] | None] = {}
    for place, key in enumerate(_read_keys(document)):
        if document.peek() == "[":
            found[key] = place, _are_rows(key, document)
        else:
            found[key] = None
            document.take_value()
    if document.peek():
        raise InputError(
            f"{document.path} has several JSON values, each on several lines",
            "write one a line: jq -c . FILE",
        )
    return found


def _are_rows(key: str, document: _Document) -> bool:
    """Read an array; return whether it has objects only that are not the parts of one conversation."""
    elements = (value for _, value, _ in _read_elements(document))
    first = next(elements, None)
    is_turn = isinstance(first, dict) and any(keys <= first.keys() for keys in CHAT_KEYS)
    is_of_tools = (key in TOOL_NAMES and is_tool_list([first])) or (
        key in CALL_NAMES and is_call_list([first])
    )
    others = [isinstance(value, dict) for value in elements]
    return isinstance(first, dict) and not is_turn and not is_of_tools and all(others)


def _choose_array(
    path: Path, found: Mapping[str, tuple[int, bool] | None], records_key: str | None
) -> int | None:
    """Return the place of the array with the rows in its object; None where the object itself is one."""
    if records_key is not None:
        named = found.get(records_key)
        if named is None:
            raise InputError(
                f"{path} has no array {records_key!r}; it has {', '.join(map(repr, found))}",
                "correct `records_key` in its entry of collect.sources",
            )
        return named[0]
    places = {key: array[0] for key, array in found.items() if array and array[1]}
    if len(places) > 1:
        raise InputError(
            f"{path} has several arrays of objects: {', '.join(map(repr, places))}",
            "name the one with the rows: `records_key` in its entry of collect.sources",
        )
    return next(iter(places.values()), None)


def _check_end(document: _Document) -> None:
    if document.peek():
        raise document.report("Extra data after the array")
