"""A file of the user's own rows as records of the pipeline.

A row that cannot be learned from is rejected with its file, line and reason, or stops the run, as the caller
chooses. A file that cannot give a row at all always stops the run.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from stages.common.errors import InputError
from stages.common.logs import ROWS_A_STEP
from stages.common.messages import Message, Tool, find_conversation_problem
from stages.common.records import ORIGINS, Row, count_chars, make_row
from stages.common.sources import Collected, Rejected
from stages.common.sources.files.csv_records import check_header
from stages.common.sources.files.encodings import guess_encoding
from stages.common.sources.files.entries import (
    BadRow,
    Entry,
    Record,
    convert_to_text,
    count,
    find_nul,
    is_encodable,
    show_bytes,
)
from stages.common.sources.files.formats import (
    FileFormat,
    FormatOptions,
    detect_format,
    read_entries,
    report_empty,
)
from stages.common.sources.files.messages import read_conversation
from stages.common.sources.files.preferences.answers import read_rating, read_rejected
from stages.common.sources.files.shapes import Columns, Shape, detect_shape
from stages.common.sources.files.tools.schemas import UnreadKey
from stages.common.sources.files.turns import find_unread_keys
from stages.common.spool import Spool

MAX_SHOWN = 50  # different problems in one message; the count is always of all
MAX_LINES_SHOWN = 5  # of one problem
SAMPLE_RECORDS = 1000
MAX_GROUP_CHARS = 120
MAX_UNDECODABLE_SHARE = 0.01  # more rows that are not UTF-8: the file is in another encoding

# What a problem of a conversation is counted as, by a part of its text.
PROBLEMS = {
    "no answer": "no_answer",
    "is the result of": "orphan_result",
    "before the results": "missing_result",
    "two calls with one id": "repeated_id",
    "neither text nor a call": "empty_turn",
    "calls a tool": "wrong_call",
}

ROW_LIKE_CELL = "cell of several lines that look like rows, as after an open quote"

OnBadRow = Literal["reject", "stop"]
OnProgress = Callable[[int], None]


def collect_file(
    path: Path,
    license: str,
    origin: str,
    options: FormatOptions,
    columns: Columns,
    system_prompt: str | None,
    on_bad_row: OnBadRow,
    on_progress: OnProgress = lambda done: None,
) -> Collected:
    """Read the rows of one file.

    Args:
        on_progress: called with the number of entries read, now and then.

    Raises:
        InputError: the file is missing, empty, of an unknown format or shape, or lacks a column; it gives no
            row; or `on_bad_row` is "stop" and rows are bad, all of which are in the message.
    """
    if origin not in ORIGINS:
        raise InputError(f"{path}: unknown origin {origin!r}", f"use one of {', '.join(ORIGINS)}")
    format = detect_format(path, options)
    sample, entries = sample_entries(read_entries(path, format))
    if not sample:
        raise report_empty(path)
    fields = read_fields(sample)
    if fields and format.kind == "csv" and not format.column_names:
        check_header(path, fields)
    shape = detect_shape(path, fields, columns) if fields else Shape("pair")
    rows: Spool[Row] = Spool(count_chars)
    rejected: Spool[Rejected] = Spool(lambda reject: len(reject.content))
    unread: Counter[str] = Counter()
    forms: Counter[str] = Counter()
    read = {*shape.columns.values(), *columns.named}
    for number, entry in enumerate(entries, start=1):
        try:
            if isinstance(entry.fields, BadRow):
                raise entry.fields
            unread.update(_list_unread(entry.fields, read, shape))
            row, found = to_row(entry.fields, str(path), license, origin, shape, columns, system_prompt)
            rows.append(row)
            unread.update(str(form) for form in found if isinstance(form, UnreadKey))
            forms.update(form for form in found if not isinstance(form, UnreadKey))
            forms[ROW_LIKE_CELL] += entry.may_hold_rows
        except BadRow as bad:
            detail, content = show_bytes(bad.detail), show_bytes(entry.content)
            rejected.append(Rejected(str(path), entry.line, bad.reason, detail, content))
        if number % ROWS_A_STEP == 0:
            on_progress(number)
    _check_encoding_fits(path, format, rejected, len(rows))
    if rejected and on_bad_row == "stop":
        raise InputError(
            f"{path} has {count(len(rejected), 'bad row')}\n{list_rejected(rejected)}",
            "correct the lines above, or set collect.on_bad_row: reject to go on without them",
        )
    if not rows:
        raise InputError(
            f"{path} has no usable row: all {len(rejected)} are bad\n{list_rejected(rejected)}",
            "correct the file, or remove its entry from collect.sources",
        )
    return Collected(rows, rejected, describe(format, shape, unread, forms))


def _list_unread(fields: Record, read: set[str], shape: Shape) -> Iterator[str]:
    """Yield the columns that have a value and are not read, and the keys of turns, as `messages[].name`."""
    yield from (str(n) for n, value in fields.items() if n and n not in read and value not in (None, ""))
    for column in dict.fromkeys(shape.columns.values()):
        yield from (f"{column}[].{key}" for key in find_unread_keys(fields.get(column)))


def sample_entries(entries: Iterator[Entry]) -> tuple[list[Entry], Iterator[Entry]]:
    """Return the first entries, and an iterator over all of them."""
    sample = list(islice(entries, SAMPLE_RECORDS))
    return sample, chain(sample, entries)


def read_fields(entries: Iterable[Entry]) -> list[Record]:
    """Return the fields of the entries that could be read."""
    return [entry.fields for entry in entries if not isinstance(entry.fields, BadRow)]


def to_row(
    fields: Record,
    source: str,
    license: str,
    origin: str,
    shape: Shape,
    columns: Columns,
    system_prompt: str | None,
) -> tuple[Row, set[str]]:
    """Turn the fields of one record into a row; return it with the forms in which its tools were written.

    Keys of tools that are not read are among the forms (`UnreadKey`).

    Raises:
        BadRow: there is nothing to learn from in it.
    """
    forms: set[str] = set()
    own, tools = read_conversation(fields, shape, forms)
    messages = check_conversation(own, tools, system_prompt)
    rejected = read_rejected(fields, shape, own, forms)
    if rejected:
        check_conversation([*messages[:-1], rejected], tools, None)
    given = fields.get(columns.group) if columns.group else None
    group = convert_to_text(given) if given not in (None, "") else None
    tags = {
        name: convert_to_text(fields[name]) for name in columns.tags if fields.get(name) not in (None, "")
    }
    check_texts([group or "", *tags.values()])
    row = make_row(
        messages,
        source,
        license,
        group=name_group(group) if group is not None else None,
        tags=tags,
        origin=origin,
        tools=tools,
        rejected=rejected,
        is_desirable=read_rating(fields.get(shape.rating)) if shape.rating else None,
    )
    return row, forms


def name_group(text: str) -> str:
    """Return the name of a group: its text, or the hash of a long one, such as a passage in every row."""
    if len(text) <= MAX_GROUP_CHARS:
        return text
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def check_conversation(
    messages: Sequence[Message], tools: Sequence[Tool], system_prompt: str | None
) -> list[Message]:
    """Return messages that can be learned from, with the system prompt before those that have none.

    Raises:
        BadRow: they cannot.
    """
    messages = list(messages)
    if system_prompt and messages and messages[0].role != "system":
        messages.insert(0, Message("system", system_prompt))
    problem = find_conversation_problem(messages)
    if problem:
        raise BadRow(_name_problem(problem), problem)
    check_texts(_list_texts(messages, tools))
    if not any(message.role == "user" and message.content.strip() for message in messages):
        raise BadRow("no_question", "every user message is empty")
    return messages


def check_texts(texts: Iterable[str]) -> None:
    """Raise a BadRow if one of the texts cannot be stored."""
    for text in texts:
        if not is_encodable(text):
            raise BadRow("not_text", "half of a surrogate pair, which is not a character")
        if fault := find_nul(text):
            raise fault


def _name_problem(problem: str) -> str:
    """Return the word to count a problem of `find_conversation_problem` by."""
    return next((reason for part, reason in PROBLEMS.items() if part in problem), "wrong_messages")


def _list_texts(messages: Sequence[Message], tools: Sequence[Tool]) -> Iterator[str]:
    """Yield every text of a conversation that is stored."""
    for message in messages:
        yield from (message.content, message.reasoning or "", message.tool_call_id or "")
        for call in message.tool_calls:
            yield from (call.arguments, call.id or "")
    yield from (tool.text for tool in tools)


def describe(format: FileFormat, shape: Shape, unread: Counter[str], forms: Counter[str]) -> dict[str, Any]:
    """Return format and shape for the report, and by rows: columns that were not read, and unusual forms."""
    return {
        "format": format.kind,
        "encoding": format.encoding,
        "delimiter": format.dialect.delimiter if format.dialect else None,
        "lines_above_header": format.dialect.lines_above if format.dialect else 0,
        "shape": shape.name,
        "columns": shape.columns,
        "unread_columns": dict(sorted(unread.items())),
        "forms": dict(sorted((+forms).items())),
    }


def list_rejected(rejected: Iterable[Rejected]) -> str:
    """Return a line for each fault with the first lines that have it; faults after `MAX_SHOWN` by number."""
    first: dict[tuple[str, str, str], list[int | None]] = {}
    numbers: Counter[tuple[str, str, str]] = Counter()
    rest: Counter[str] = Counter()
    for reject in rejected:
        fault = (reject.file, reject.reason, reject.detail)
        if fault not in first and len(first) == MAX_SHOWN:
            rest[reject.reason] += 1
            continue
        numbers[fault] += 1
        if numbers[fault] <= MAX_LINES_SHOWN:
            first.setdefault(fault, []).append(reject.line)
    lines = [_describe_fault(*fault, places, numbers[fault]) for fault, places in first.items()]
    if rest:
        lines.append("and " + ", ".join(f"{number} more {reason}" for reason, number in sorted(rest.items())))
    return "\n".join(lines)


def _describe_fault(file: str, reason: str, detail: str, places: Sequence[int | None], number: int) -> str:
    text = f"{file}:{places[0]}: {reason}: {detail}"
    if number == 1:
        return text
    others = ", ".join(map(str, places[1:]))
    more = f" and {number - len(places):,} more" if number > len(places) else ""
    return f"{text} ({count(number, 'row')}: also {others}{more})"


def _check_encoding_fits(path: Path, format: FileFormat, rejected: Sequence[Rejected], good: int) -> None:
    """Raise an InputError if so many rows are not UTF-8 that the file is in another encoding."""
    if format.is_certain:
        return
    undecodable = sum(reject.reason == "undecodable" for reject in rejected)
    if undecodable > max(1, MAX_UNDECODABLE_SHARE * (good + len(rejected))):
        guess = guess_encoding(path)
        raise InputError(
            f"{path} is not UTF-8: {undecodable:,} of {count(good + len(rejected), 'row')} are not valid, "
            f"and the bytes look like {guess}",
            f"set `encoding: {guess}` in its entry of collect.sources (`utf-8` rejects those rows)",
        )
