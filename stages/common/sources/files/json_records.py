"""JSONL: one object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from stages.common.sources.files.encodings import open_text
from stages.common.sources.files.entries import BadRow, Entry, Record, check_object, find_undecodable
from stages.common.sources.files.strict_json import keep_repeated

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
        return check_object(json.loads(line, object_pairs_hook=keep_repeated))
    except RecursionError:
        return BadRow("broken_json", "nested too deeply")
    except json.JSONDecodeError as error:
        return BadRow("broken_json", f"{error.msg} at character {error.pos + 1}")
    except ValueError as error:  # a number of thousands of digits
        return BadRow("broken_json", str(error))


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
