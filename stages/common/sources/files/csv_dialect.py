"""Detect the dialect of delimited text: delimiter, quotes, and how many lines are above the header."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, takewhile
from pathlib import Path

from stages.common.errors import InputError
from stages.common.sources.files.csv_records import (
    FITTING_SHARE,
    MIN_ROWS_TO_FIT,
    SAMPLE_RECORDS,
    Dialect,
    Record,
    find_width,
    read_records,
    strip_mark,
)
from stages.common.sources.files.entries import BadRow, shorten_text

DELIMITERS = (",", ";", "\t", "|")
MAX_SAMPLE_RECORD_LINES = 100
SPACED_SHARE = 0.9  # of the lines with `, "`: a space after each delimiter is no part of the cell


def detect_dialect(
    text: str, path: Path, delimiter: str | None = None, column_names: Sequence[str] = ()
) -> Dialect:
    """Return the dialect of delimited text, judged on its first records.

    A delimiter counts by the share of records that have as many cells as the header.

    Raises:
        InputError: two delimiters fit equally well, or a line may be a comment or the header.
    """
    lines = list(strip_mark(io.StringIO(text, newline="")))
    sep = _read_sep_line(lines[0]) if lines else None
    delimiter = delimiter or sep
    first = 1 if sep else 0
    dialects = []
    for one in (delimiter,) if delimiter else DELIMITERS:
        above = first + _count_comments(lines[first:], one, len(column_names))
        dialects.append(replace(_detect_quoting(lines[above:], one), lines_above=above))
    dialect = dialects[0] if delimiter else _choose(path, lines, dialects)
    if not column_names:
        _refuse_unclear_comment(path, lines, dialect)
    return dialect


def _choose(path: Path, lines: Sequence[str], dialects: Sequence[Dialect]) -> Dialect:
    rates = [_rate(lines, dialect) for dialect in dialects]
    best = max(rates)
    if best == (0.0, 0):
        return _choose_by_rows(path, lines, dialects)
    fitting = [dialect for rate, dialect in zip(rates, dialects, strict=True) if rate == best]
    if len(fitting) > 1:
        names = " and ".join(repr(dialect.delimiter) for dialect in fitting)
        raise InputError(
            f"{path}: {names} are equally likely delimiters",
            "set `delimiter` in its entry of collect.sources",
        )
    return fitting[0]


def _rate(lines: Sequence[str], dialect: Dialect) -> tuple[float, int]:
    """Return the share of the first records that are as wide as the header, and that width.

    Delimiters at the end of only the header or only the rows do not count.
    """
    records = _read_sample(lines[dialect.lines_above :], dialect)
    if not records or isinstance(records[0].cells, BadRow) or len(records[0].cells) < 2:
        return 0.0, 0
    width, columns = find_width(records[0].cells), len(records[0].cells)
    whole = [record.cells for record in records if not isinstance(record.cells, BadRow)]
    fitting = sum(len(cells) >= width and find_width(cells) <= columns for cells in whole)
    return round(fitting / len(records), 2), columns


def _choose_by_rows(path: Path, lines: Sequence[str], dialects: Sequence[Dialect]) -> Dialect:
    """Return the dialect of a text whose header has one column: the one by which its rows have several.

    A title above the header is such a text; the reader then names it. In a .tsv a comma is no delimiter.
    """
    if not {".tsv", ".tab"}.isdisjoint(map(str.lower, path.suffixes)):
        return next(dialect for dialect in dialects if dialect.delimiter == "\t")
    for dialect in dialects:
        rows = _read_sample(lines[dialect.lines_above :], dialect)[1:]
        widths = Counter(len(row.cells) for row in rows if not isinstance(row.cells, BadRow))
        width, number = max(widths.items(), key=lambda item: item[1], default=(0, 0))
        if width > 1 and len(rows) >= MIN_ROWS_TO_FIT and number >= FITTING_SHARE * len(rows):
            return dialect
    return Dialect(lines_above=dialects[0].lines_above)


def _read_sample(lines: Sequence[str], dialect: Dialect) -> list[Record]:
    return list(islice(read_records(lines, dialect, max_lines=MAX_SAMPLE_RECORD_LINES), SAMPLE_RECORDS))


def _read_sep_line(line: str) -> str | None:
    """Return the delimiter of Excel's first line `sep=;`."""
    content = line.rstrip("\r\n").strip('"')
    return content[4] if content.lower().startswith("sep=") and len(content) == 5 else None


def _count_comments(lines: Sequence[str], delimiter: str, columns: int) -> int:
    """Return how many lines above the header are comments: `# …`.

    The header itself may begin with the sign, and so may a row. Such a line has as many delimiters as the
    next one, or as the columns that were given.
    """
    marked = list(takewhile(lambda line: not line.strip() or line.lstrip('"').startswith("#"), lines))
    if len(marked) == len(lines) or not any(map(str.strip, marked)):
        return 0
    if columns:
        rows = (place for place, line in enumerate(marked) if line.count(delimiter) == columns - 1)
        return next(rows, len(marked))
    last = max(place for place, line in enumerate(marked) if line.strip())
    wide = marked[last].count(delimiter)
    return last if wide and wide == lines[len(marked)].count(delimiter) else len(marked)


def _refuse_unclear_comment(path: Path, lines: Sequence[str], dialect: Dialect) -> None:
    """Raise an InputError if the header begins with `# ` and a text: it is as wide as the rows by chance."""
    for number, line in enumerate(lines[dialect.lines_above :], start=dialect.lines_above + 1):
        content = line.strip().strip('"')
        if content.startswith(("# ", "##")) and content.split(dialect.delimiter)[0].strip() != "#":
            raise InputError(
                f"{path}:{number}: it is unclear whether this is a comment or the header: "
                f"{shorten_text(content, 60)}",
                "remove the line if it is a comment, and the sign # if it is the header",
            )
        if content:
            return


def _detect_quoting(lines: Sequence[str], delimiter: str) -> Dialect:
    """Return the dialect that breaks the fewest records: doubled quotes, escaped quotes, or none at all."""
    spaced = [f'{delimiter} "' in line for line in lines[1:SAMPLE_RECORDS]]
    doubled = Dialect(delimiter, skips_space=sum(spaced) > SPACED_SHARE * max(1, len(spaced)))
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
    for record in _read_sample(lines, dialect):
        if isinstance(record.cells, BadRow):
            broken += 1
        elif record.lines[0].startswith('"') or f'{dialect.delimiter}"' in record.lines[0]:
            quoted += 1
    return broken, quoted
