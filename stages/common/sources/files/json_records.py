"""JSONL (one object a line) and JSON documents (an array, or an object with one array of objects)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.common.errors import InputError
from stages.common.sources.files.encodings import open_text
from stages.common.sources.files.entries import BadRow, Entry, Record, find_undecodable

CHAT_KEYS = ({"role", "content"}, {"from", "value"})
WHITESPACE = " \t\r\n"


def read_jsonl(path: Path, encoding: str = "utf-8-sig") -> Iterator[Entry]:
    """Yield the objects of a file with one a line; blank lines are skipped."""
    # Only "\n" ends a line: U+2028 and U+0085 may be in a JSON text as they are.
    with open_text(path, encoding, newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            content = line.rstrip("\r\n")
            if content.strip():
                yield Entry(number, content, _parse_line(content, encoding))


def _parse_line(line: str, encoding: str) -> Record | BadRow:
    undecodable = find_undecodable(line, encoding.removesuffix("-sig"))
    if undecodable:
        return BadRow("undecodable", undecodable)
    try:
        return _check_object(json.loads(line))
    except RecursionError:
        return BadRow("broken_json", "nested too deeply")
    except json.JSONDecodeError as error:
        return BadRow("broken_json", f"{error.msg} at character {error.pos + 1}")
    except ValueError as error:  # a number of thousands of digits
        return BadRow("broken_json", str(error))


def _check_object(value: Any) -> Record | BadRow:
    if isinstance(value, dict):
        return value
    return BadRow("broken_json", f"a {type(value).__name__} instead of an object")


def is_json_document(sample: str, suffix: str) -> bool:
    """Return whether a text is one JSON document, not one object a line; `suffix` decides a single line."""
    lines = [line for line in sample.removeprefix("\ufeff").split("\n") if line.strip()]
    if not lines:
        return False
    first = _parse_line(lines[0].strip(), "utf-8")
    if lines[0].lstrip(WHITESPACE).startswith("["):
        # A complete array on the first of several lines is a bad row of JSONL.
        return len(lines) == 1 or (isinstance(first, BadRow) and "instead of" not in first.detail)
    return suffix == ".json" and (isinstance(first, BadRow) or len(lines) == 1)


def read_json(path: Path, encoding: str, records_key: str | None = None) -> Iterator[Entry]:
    """Yield the objects of a JSON document.

    Args:
        records_key: the key of the array; needed only where an object has several.

    Raises:
        InputError: the document is broken (named with its line), or it is unclear which array has the rows.
    """
    with open_text(path, encoding, newline="") as file:
        text = file.read().lstrip("\ufeff")
    undecodable = find_undecodable(text, encoding)
    if undecodable:
        raise InputError(f"{path}: {undecodable}", "set `encoding` in its entry of collect.sources")
    start = len(text) - len(text.lstrip(WHITESPACE))
    if text.startswith("[", start):
        yield from _read_array(path, text, start)
    elif text.startswith("{", start):
        yield from _read_object(path, text, records_key)
    elif text.strip():
        raise InputError(
            f"{path} is neither a JSON array nor an object", "write one JSON object a line (.jsonl)"
        )


def _read_array(path: Path, text: str, start: int) -> Iterator[Entry]:
    """Yield the elements of the array that begins at `start`, each with the line it begins on."""
    decode = json.JSONDecoder().raw_decode
    place, line, counted_to, first = start + 1, 1, 0, True
    while True:
        place = _skip_whitespace(text, place)
        if text.startswith("]", place):
            return
        if not first:
            if not text.startswith(",", place):
                raise _broken(path, text, place, "Expecting ',' or ']'")
            place = _skip_whitespace(text, place + 1)
        line += text.count("\n", counted_to, place)
        counted_to = place
        try:
            value, end = decode(text, place)
        except json.JSONDecodeError as error:
            raise _broken(path, text, error.pos, error.msg) from None
        except (RecursionError, ValueError) as error:
            raise _broken(path, text, place, str(error)) from None
        yield Entry(line, text[place:end], _check_object(value))
        place, first = end, False


def _read_object(path: Path, text: str, records_key: str | None) -> Iterator[Entry]:
    """Yield the rows of an object: those of its one array of objects, or the object itself if it has none."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            raise InputError(
                f"{path} has several JSON values, each on several lines", "write one a line: jq -c . FILE"
            ) from None
        raise _broken(path, text, error.pos, error.msg) from None
    except (RecursionError, ValueError) as error:
        raise _broken(path, text, 0, str(error)) from None
    arrays = {key: rows for key, rows in value.items() if _is_array_of_rows(rows)}
    if records_key is not None:
        if not isinstance(value.get(records_key), list):
            raise InputError(
                f"{path} has no array {records_key!r}; it has {', '.join(map(repr, value))}",
                "correct `records_key` in its entry of collect.sources",
            )
        arrays = {records_key: value[records_key]}
    if len(arrays) > 1:
        raise InputError(
            f"{path} has several arrays of objects: {', '.join(map(repr, arrays))}",
            "name the one with the rows: `records_key` in its entry of collect.sources",
        )
    rows = next(iter(arrays.values()), [value])
    for number, row in enumerate(rows, start=1):
        yield Entry(number, json.dumps(row, ensure_ascii=False), _check_object(row))


def _is_array_of_rows(value: Any) -> bool:
    """Return whether a value is a list of objects that are not the turns of one conversation."""
    if not isinstance(value, list) or not value or not all(isinstance(row, dict) for row in value):
        return False
    return not any(keys <= value[0].keys() for keys in CHAT_KEYS)


def _skip_whitespace(text: str, place: int) -> int:
    while place < len(text) and text[place] in WHITESPACE:
        place += 1
    return place


def _broken(path: Path, text: str, place: int, message: str) -> InputError:
    line = text.count("\n", 0, place) + 1
    column = place - (text.rfind("\n", 0, place) + 1) + 1
    return InputError(
        f"{path}:{line}: broken JSON: {message} at character {column}",
        "correct that line; rows of a file with one object a line (.jsonl) can be rejected one by one",
    )
