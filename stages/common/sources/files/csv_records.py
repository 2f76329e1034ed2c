"""Delimited text: the dialect, and records that survive a quote left open.

The `csv` module reads on from an open quote to the end of the file. Here a record that does not end well
costs its own line, or the lines up to the one where its stray quote closes: each is rejected by its number.
"""

from __future__ import annotations

import csv
import io
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from stages.common.errors import InputError
from stages.common.sources.files.encodings import open_text
from stages.common.sources.files.entries import BadRow, Entry, count, find_undecodable, shorten

DELIMITERS = (",", ";", "\t", "|")
SAMPLE_RECORDS = 500
MAX_RECORD_LINES = 1000
MAX_SAMPLE_RECORD_LINES = 100
STRAY_QUOTE_LINES = 50  # as far after a broken record its closing quote is searched
SPACED_SHARE = 0.9  # of the lines with `, "`: a space after each delimiter is no part of the cell
MIN_ROWS_TO_JUDGE = 5
MAX_NAME_CHARS = 80  # of a column
MAX_NAME_SHARE = 0.02  # of the rows may have the name of a column as its value
MIN_SWALLOWED_LINES = 6  # in a cell: prose of that many lines has not the delimiters of a row in each


@dataclass(frozen=True, slots=True)
class Dialect:
    """How cells are written; `quote` None: quotes are characters like any other."""

    delimiter: str = ","
    quote: str | None = '"'
    escape: str | None = None
    skips_space: bool = False
    has_sep_line: bool = False

    def split(self, lines: Iterable[str]) -> list[str]:
        """Return the cells of the record that begins at the first of `lines`, reading as many as it needs.

        Raises:
            csv.Error: quotes are wrong, or do not close.
        """
        csv.field_size_limit(2**31 - 1)  # the default of 131,072 characters is a short document
        reader = csv.reader(
            lines,
            delimiter=self.delimiter,
            quotechar=self.quote,
            escapechar=self.escape,
            doublequote=self.escape is None,
            skipinitialspace=self.skips_space,
            quoting=csv.QUOTE_NONE if self.quote is None else csv.QUOTE_MINIMAL,
            strict=True,
        )
        return next(reader, [])


@dataclass(frozen=True, slots=True)
class Record:
    """The cells of one record, or the reason why its line has none; `lines` are the ones it covers."""

    line: int
    lines: tuple[str, ...]
    cells: list[str] | BadRow


class _Window:
    """Lines with their numbers, some of them read ahead."""

    def __init__(self, lines: Iterable[str], first: int) -> None:
        self._rest = iter(lines)
        self._ahead: deque[str] = deque()
        self.line = first

    def peek(self, limit: int) -> Iterator[str]:
        """Yield up to `limit` lines from the current one on, without moving."""
        for place in range(limit):
            if place == len(self._ahead):
                following = next(self._rest, None)
                if following is None:
                    return
                self._ahead.append(following)
            yield self._ahead[place]

    def take(self, number: int) -> tuple[str, ...]:
        """Return the next `number` lines and move behind them."""
        self.line += number
        return tuple(self._ahead.popleft() for _ in range(number))


def read_records(
    lines: Iterable[str], dialect: Dialect, first_line: int = 1, max_lines: int = MAX_RECORD_LINES
) -> Iterator[Record]:
    """Yield the records of delimited text, the header among them; blank lines are skipped."""
    window = _Window(lines, first_line)
    width: int | None = None
    while any(window.peek(1)):
        used, cells = _try_record(window, dialect, max_lines)
        line = window.line
        covered = tuple(window.peek(used))
        if not isinstance(cells, BadRow) and width and _has_swallowed_rows(covered, dialect, width):
            cells = BadRow("broken_csv", f"a quote opens here and swallows {count(used - 1, 'line')} of rows")
        if not isinstance(cells, BadRow):
            width = width or len(cells)
            taken = window.take(used)
            if cells:
                yield Record(line, taken, cells)
            continue
        lost = _find_stray_quote(window, dialect, width)
        yield Record(line, window.take(1), cells)
        for _ in range(lost):
            fault = BadRow("broken_csv", f"part of the record with the wrong quote on line {line}")
            yield Record(window.line, window.take(1), fault)


def _try_record(window: _Window, dialect: Dialect, max_lines: int) -> tuple[int, list[str] | BadRow]:
    """Return how many lines the record at the window covers, and its cells or its fault."""
    used = 0

    def feed() -> Iterator[str]:
        nonlocal used
        for line in window.peek(max_lines):
            used += 1
            yield line

    try:
        cells = dialect.split(feed())
        return used, cells
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            return used, BadRow(
                "broken_csv", f"a quote opens here and is not closed in {count(used, 'line')}"
            )
        return used, BadRow("broken_csv", f"{error} (line {window.line + used - 1})")


def _has_swallowed_rows(lines: Sequence[str], dialect: Dialect, width: int) -> bool:
    """Return whether the lines of one record are many and would each be a row without their quotes."""
    return (
        len(lines) >= MIN_SWALLOWED_LINES
        and width > 1
        and all(line.count(dialect.delimiter) == width - 1 for line in lines)
    )


def _find_stray_quote(window: _Window, dialect: Dialect, width: int | None) -> int:
    """Return how many lines after the current one still belong to the broken record.

    Its end is the next line with a quote in the wrong place; without one near, the next line is a row again.
    """
    for place, line in enumerate(islice(window.peek(STRAY_QUOTE_LINES + 1), 1, None), start=1):
        if _has_stray_quote(line, dialect):
            return place
    return 0


def _has_stray_quote(line: str, dialect: Dialect) -> bool:
    quote = dialect.quote
    if quote is None or quote not in line:
        return False
    try:
        cells = dialect.split([line])
    except csv.Error as error:
        return "unexpected end of data" not in str(error)
    # In a cell that is not quoted, a quote is read as it is.
    bare = line.rstrip("\r\n").split(dialect.delimiter)
    return len(bare) == len(cells) and any(quote in cell and not cell.startswith(quote) for cell in bare)


def detect_dialect(text: str, path: Path, delimiter: str | None = None) -> Dialect:
    """Return the dialect of delimited text, judged on its first records.

    A delimiter counts by the share of records that have as many cells as the header.

    Raises:
        InputError: two delimiters fit equally well.
    """
    lines = list(io.StringIO(text, newline=""))
    if lines and (sep := _read_sep_line(lines[0])):
        return _detect_quoting(lines[1:], delimiter or sep, has_sep_line=True)
    if delimiter:
        return _detect_quoting(lines, delimiter)
    found = [(_rate(lines, dialect), dialect) for dialect in (_detect_quoting(lines, d) for d in DELIMITERS)]
    best = max(rate for rate, _ in found)
    if best == (0.0, 0):
        return Dialect()  # one column
    fitting = [dialect for rate, dialect in found if rate == best]
    if len(fitting) > 1:
        names = " and ".join(repr(dialect.delimiter) for dialect in fitting)
        raise InputError(
            f"{path}: {names} are equally likely delimiters",
            "set `delimiter` in its entry of collect.sources",
        )
    return fitting[0]


def _read_sep_line(line: str) -> str | None:
    """Return the delimiter of Excel's first line `sep=;`."""
    content = line.rstrip("\r\n").strip('"')
    return content[4] if content.lower().startswith("sep=") and len(content) == 5 else None


def _rate(lines: Sequence[str], dialect: Dialect) -> tuple[float, int]:
    """Return the share of the first records that are as wide as the header, and that width."""
    records = list(islice(read_records(lines, dialect, max_lines=MAX_SAMPLE_RECORD_LINES), SAMPLE_RECORDS))
    if not records or isinstance(records[0].cells, BadRow) or len(records[0].cells) < 2:
        return 0.0, 0
    width = len(records[0].cells)
    fitting = sum(not isinstance(r.cells, BadRow) and len(r.cells) == width for r in records)
    return round(fitting / len(records), 2), width


def _detect_quoting(lines: Sequence[str], delimiter: str, has_sep_line: bool = False) -> Dialect:
    """Return the dialect that breaks the fewest records: doubled quotes, escaped quotes, or none at all."""
    spaced = [f'{delimiter} "' in line for line in lines[1:SAMPLE_RECORDS]]
    doubled = Dialect(
        delimiter, skips_space=sum(spaced) > SPACED_SHARE * max(1, len(spaced)), has_sep_line=has_sep_line
    )
    broken, quoted = _count_quotes(lines, doubled)
    if not broken:
        return doubled
    escaped = replace(doubled, escape="\\")
    if any('\\"' in line for line in lines) and 2 * _count_quotes(lines, escaped)[0] < broken:
        return escaped
    # Tab-separated files often know no quotes. Elsewhere a cell with the delimiter needs them.
    if delimiter in "\t|" and broken > quoted:
        return replace(doubled, quote=None)
    return doubled


def _count_quotes(lines: Sequence[str], dialect: Dialect) -> tuple[int, int]:
    """Return how many of the first records are broken, and how many are whole and have quotes."""
    broken = quoted = 0
    for record in islice(read_records(lines, dialect, max_lines=MAX_SAMPLE_RECORD_LINES), SAMPLE_RECORDS):
        if isinstance(record.cells, BadRow):
            broken += 1
        elif record.lines[0].startswith('"') or f'{dialect.delimiter}"' in record.lines[0]:
            quoted += 1
    return broken, quoted


def read_csv(
    path: Path, encoding: str, dialect: Dialect, column_names: Sequence[str] = ()
) -> Iterator[Entry]:
    """Yield the rows of delimited text; the line is the one that a row begins on.

    Args:
        column_names: of a file without a header; empty: the first line has them.

    Raises:
        InputError: the header cannot be read, or has one name twice.
    """
    with open_text(path, encoding, newline="") as lines:
        first_line = 1
        if dialect.has_sep_line:
            next(lines)
            first_line = 2
        records = read_records(lines, dialect, first_line)
        header = list(column_names) or _read_header(path, next(records, None))
        for record in records:
            text = "".join(record.lines).rstrip("\r\n")
            yield Entry(record.line, text, _name_cells(header, record.cells, encoding))


def _read_header(path: Path, record: Record | None) -> list[str]:
    if record is None:
        return []
    if isinstance(record.cells, BadRow):
        raise InputError(f"{path}:{record.line}: the header is broken: {record.cells.detail}", "correct it")
    header = [name.strip().lstrip("\ufeff") for name in record.cells]
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise InputError(f"{path} has the column {twice[0]!r} twice", "rename one of them")
    return header


def check_header(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise an InputError if the names of the columns look like the values of a first row."""
    for name in filter(None, rows[0] if len(rows) >= MIN_ROWS_TO_JUDGE else ()):
        same = sum(row.get(name) == name for row in rows)
        if len(name) > MAX_NAME_CHARS or same > MAX_NAME_SHARE * len(rows):
            raise InputError(
                f"{path} has no header: its first line, {shorten(', '.join(rows[0]))}, looks like a row",
                "add a line with the names of the columns, or set `column_names`",
            )


def _name_cells(header: Sequence[str], cells: list[str] | BadRow, encoding: str) -> dict[str, str] | BadRow:
    if isinstance(cells, BadRow):
        return cells
    if len(cells) != len(header):
        return BadRow("broken_csv", f"{count(len(cells), 'cell')} under {count(len(header), 'column')}")
    for name, cell in zip(header, cells, strict=True):
        if undecodable := find_undecodable(cell, encoding.removesuffix("-sig")):
            return BadRow("undecodable", f"in column {name}: {undecodable}")
    return dict(zip(header, cells, strict=True))
