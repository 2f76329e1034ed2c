"""Delimited text: records that survive a quote left open, and their cells by the names in the header.

The `csv` module reads on from an open quote to the end of the file. Here a record that does not end well
costs its own line, or the lines up to the one where its stray quote closes: each is rejected by its number.
"""

from __future__ import annotations

import csv
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from stages.common.errors import InputError
from stages.common.sources.files.encodings import open_text
from stages.common.sources.files.entries import (
    BadRow,
    Entry,
    count,
    find_nul,
    find_undecodable,
    shorten,
    shorten_text,
)

SAMPLE_RECORDS = 500
MAX_RECORD_LINES = 1000
STRAY_QUOTE_LINES = 50  # as far after a broken record its closing quote is searched
MIN_ROWS_TO_JUDGE = 5
MAX_NAME_CHARS = 80  # of a column
MAX_NAME_SHARE = 0.02  # of the rows may have the name of a column as its value
MIN_ROWS_TO_FIT = 2  # to the header: in a single row, an empty last cell may follow a comma of the text
FITTING_SHARE = 0.9  # of the rows: the others are broken
MARKDOWN_RULE = re.compile(r" *:?-+:? *")
MIN_SWALLOWED_LINES = 6  # in a cell: prose of that many lines has not the delimiters of a row in each
MIN_SUSPICIOUS_LINES = 3  # of a cell, with the delimiters of a row: told, as they may be prose or rows
LINES_PER_ODD_ONE = 50  # in so many rows that a quote swallows, one line may be none


@dataclass(frozen=True, slots=True)
class Dialect:
    """How cells are written.

    Attributes:
        quote: None: quotes are characters like any other.
        lines_above: lines above the header: Excel's `sep=;`, and comments.
    """

    delimiter: str = ","
    quote: str | None = '"'
    escape: str | None = None
    skips_space: bool = False
    lines_above: int = 0

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
    """The cells of one record, or the reason why its line has none.

    Attributes:
        lines: the ones that it covers.
        may_hold_rows: they are several, and each would be a row without the quotes.
    """

    line: int
    lines: tuple[str, ...]
    cells: list[str] | BadRow
    may_hold_rows: bool = False


@dataclass(frozen=True, slots=True)
class Header:
    """The names of the columns.

    Attributes:
        line: the line they are on; None where the entry of the source gives them.
        is_exceeded: whether rows end with more delimiters than the header, with nothing behind them.
    """

    names: list[str]
    line: int | None = None
    is_exceeded: bool = False

    def trim(self, cells: list[str]) -> list[str]:
        """Return the cells of a row without those behind the last column, if they are empty."""
        width = len(self.names)
        return cells[:width] if self.is_exceeded and not any(map(str.strip, cells[width:])) else cells


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
        alike, odd = _count_row_like(covered, dialect, width or 0)
        if not isinstance(cells, BadRow) and _has_swallowed_rows(alike, odd):
            cells = BadRow("broken_csv", f"a quote opens here and swallows {count(used - 1, 'line')} of rows")
        if not isinstance(cells, BadRow):
            width = width or len(cells)
            taken = window.take(used)
            if cells:
                yield Record(line, taken, cells, alike >= MIN_SUSPICIOUS_LINES and alike > odd)
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


def _count_row_like(lines: Sequence[str], dialect: Dialect, width: int) -> tuple[int, int]:
    """Return how many lines of one record would each be a row without its quotes, and how many would not."""
    alike = sum(line.count(dialect.delimiter) == width - 1 for line in lines) if width > 1 else 0
    return alike, len(lines) - alike


def _has_swallowed_rows(alike: int, odd: int) -> bool:
    """Return whether the lines of one record are many rows, between which an open quote stands."""
    return alike >= MIN_SWALLOWED_LINES and odd <= (alike + odd) // LINES_PER_ODD_ONE


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


def read_csv(
    path: Path, encoding: str, dialect: Dialect, column_names: Sequence[str] = ()
) -> Iterator[Entry]:
    """Yield the rows of delimited text; the line is the one that a row begins on.

    Args:
        column_names: of a file without a header; empty: the first line has them.

    Raises:
        InputError: the header cannot be read, has one name twice, or no row has as many cells.
    """
    with open_text(path, encoding, newline="") as text:
        lines = islice(strip_mark(text), dialect.lines_above, None)
        records = read_records(lines, dialect, dialect.lines_above + 1)
        header = Header(list(column_names)) if column_names else _read_header(path, next(records, None))
        sample = list(islice(records, SAMPLE_RECORDS))
        header = _fit_header(path, header, sample)
        _refuse_other_tables(path, header, sample, dialect)
        for record in chain(sample, records):
            content = "".join(record.lines).rstrip("\r\n")
            yield Entry(
                record.line, content, _name_cells(header, record.cells, encoding), record.may_hold_rows
            )


def strip_mark(lines: Iterable[str]) -> Iterator[str]:
    """Yield lines without byte order marks in front of the first: a program may write a second one."""
    for number, line in enumerate(lines):
        yield line if number else line.lstrip("\ufeff")


def _read_header(path: Path, record: Record | None) -> Header:
    if record is None:
        return Header([])
    if isinstance(record.cells, BadRow):
        raise InputError(f"{path}:{record.line}: the header is broken: {record.cells.detail}", "correct it")
    names = [name.strip() for name in record.cells]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise InputError(f"{path} has the column {twice[0]!r} twice", "rename one of them")
    return Header(names, record.line)


def _fit_header(path: Path, header: Header, sample: Sequence[Record]) -> Header:
    """Return the header with as many columns as the rows have cells.

    A program may end each row with a delimiter but not the header, or the header but not the rows. Most of
    the rows decide for all.

    Raises:
        InputError: no row has a cell for each column.
    """
    rows = [record.cells for record in sample if not isinstance(record.cells, BadRow)]
    widths = Counter(map(len, rows))
    needed = FITTING_SHARE * len(rows)
    if len(rows) < MIN_ROWS_TO_FIT or widths[len(header.names)] >= needed:
        return header
    named = header.names[: find_width(header.names)]
    if widths[len(named)] >= needed:
        return replace(header, names=named)
    exceeded = replace(header, is_exceeded=True)
    if sum(len(exceeded.trim(cells)) < len(cells) for cells in rows) >= needed:
        return exceeded
    if not widths[len(header.names)]:
        raise _report_widths(path, header, sample, widths)
    return header


def find_width(cells: Sequence[str]) -> int:
    """Return the number of cells up to the last one that is not empty."""
    return next((place for place in range(len(cells), 0, -1) if cells[place - 1].strip()), 0)


def _refuse_other_tables(path: Path, header: Header, sample: Sequence[Record], dialect: Dialect) -> None:
    """Raise an InputError if the first row is a header, or the line below the header of a Markdown table."""
    cells = sample[0].cells if sample else []
    if isinstance(cells, BadRow):
        return
    if header.line is None and cells and cells == header.names:
        raise InputError(f"{path}:{sample[0].line} is a header", "remove `column_names`")
    filled = list(filter(None, cells))
    if dialect.delimiter == "|" and filled and all(map(MARKDOWN_RULE.fullmatch, filled)):
        raise InputError(f"{path} is a Markdown table", "export its rows as CSV")


def _report_widths(path: Path, header: Header, sample: Sequence[Record], widths: Counter[int]) -> InputError:
    columns = len(header.names)
    width, number = widths.most_common(1)[0]
    example = next(
        record for record in sample if not isinstance(record.cells, BadRow) and len(record.cells) == width
    )
    shown = shorten(", ".join(header.names))
    where = f"the header on line {header.line}, {shown}," if header.line else f"`column_names`, {shown},"
    fix = "give each column a name, quote cells that hold the delimiter, or set `delimiter`"
    if header.line is None:
        fix = "name each column in `column_names`, or set `delimiter`"
    elif columns == 1:
        fix = "remove the lines above the header, or set `delimiter`"
    elif width == columns + 1:
        fix = f"{fix}; a first column of row numbers needs a name, too (in R: col.names=NA)"
    return InputError(
        f"{path}: {where} has {count(columns, 'column')}, and no row has as many cells; "
        f"{number:,} of {count(widths.total(), 'row')} have {width}, such as line {example.line}: "
        f"{shorten_text(''.join(example.lines).strip(), 60)}",
        fix,
    )


def check_header(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise an InputError if the names of the columns look like the values of a first row."""
    for name in filter(None, rows[0] if len(rows) >= MIN_ROWS_TO_JUDGE else ()):
        same = sum(row.get(name) == name for row in rows)
        if len(name) > MAX_NAME_CHARS or same > MAX_NAME_SHARE * len(rows):
            raise InputError(
                f"{path} has no header: its first line, {shorten(', '.join(rows[0]))}, looks like a row",
                "add a line with the names of the columns, or set `column_names`",
            )


def _name_cells(header: Header, cells: list[str] | BadRow, encoding: str) -> dict[str, str] | BadRow:
    if isinstance(cells, BadRow):
        return cells
    if fault := next(filter(None, map(find_nul, cells)), None):
        return fault
    if [cell.strip("\ufeff ") for cell in cells] == header.names:
        return BadRow("broken_csv", "the header again")
    cells = header.trim(cells)
    if len(cells) != len(header.names):
        cause = f"{count(len(cells), 'cell')} under {count(len(header.names), 'column')}"
        return BadRow("broken_csv", cause)
    for name, cell in zip(header.names, cells, strict=True):
        if undecodable := find_undecodable(cell, encoding.removesuffix("-sig")):
            return BadRow("undecodable", f"in column {name}: {undecodable}")
    return dict(zip(header.names, cells, strict=True))
