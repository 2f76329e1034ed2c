"""A user's own rows: JSONL, CSV or Parquet, as chat messages or as prompt and completion.

A row that cannot be learned from is set aside with its file, line and reason, or stops the run,
as the caller says. A file that cannot give a row at all always stops the run.
"""

from __future__ import annotations

import csv
import difflib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stages.common.errors import InputError
from stages.common.records import ORIGINS, Message, Row, conversation_problem, make_row
from stages.common.sources import Collected, Rejected

MAX_SHOWN = 50  # problems in one message; the count is always of all
BATCH_ROWS = 4096

OnBadRow = Literal["reject", "stop"]
Record = Mapping[str, Any]


class BadRow(ValueError):
    """A row that cannot be learned from."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Columns:
    """What the columns of a file are called."""

    messages: str = "messages"
    prompt: str = "prompt"
    completion: str = "completion"
    group: str | None = None
    tags: tuple[str, ...] = ()

    @property
    def demanded(self) -> tuple[str, ...]:
        """The columns that must be there whatever form the rows have."""
        return (*((self.group,) if self.group else ()), *self.tags)


@dataclass(frozen=True, slots=True)
class Entry:
    """One row as it stood in the file: its line, its text for the rejects, and its fields or its fault."""

    line: int
    content: str
    fields: Record | BadRow


def collect_file(
    path: Path,
    license: str,
    origin: str,
    columns: Columns,
    system_prompt: str | None,
    on_bad_row: OnBadRow,
) -> Collected:
    """Read the rows of one file.

    Raises:
        InputError: the file is missing, empty, of an unknown kind or lacks a column; it gives no
            row; or `on_bad_row` is "stop" and rows are bad, all of which are in the message.
    """
    if origin not in ORIGINS:
        raise InputError(f"{path}: unknown origin {origin!r}", f"use one of {', '.join(ORIGINS)}")
    rows: list[Row] = []
    rejected: list[Rejected] = []
    for entry in check_columns(path, columns, read_entries(path)):
        try:
            if isinstance(entry.fields, BadRow):
                raise entry.fields
            rows.append(to_row(entry.fields, str(path), license, origin, columns, system_prompt))
        except BadRow as bad:
            rejected.append(Rejected(str(path), entry.line, bad.reason, bad.detail, entry.content))
    if rejected and on_bad_row == "stop":
        raise InputError(
            f"{path} has {_count(len(rejected), 'bad row')}\n{_listed(rejected)}",
            "mend the lines above, or set collect.on_bad_row: reject to go on without them",
        )
    if not rows:
        what = (
            f"{path} gives no row: all {len(rejected)} are bad\n{_listed(rejected)}"
            if rejected
            else _empty(path)
        )
        raise InputError(what, "mend the file, or take its entry out of collect.sources")
    return Collected(tuple(rows), tuple(rejected))


def read_entries(path: Path) -> Iterator[Entry]:
    """Yield what stands in the file, line by line.

    Raises:
        InputError: the file is missing, empty, unreadable, or of an unknown kind.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: files of kind {path.suffix!r} are not read", f"use {', '.join(_READERS)}")
    if not path.is_file():
        folder = path.parent
        have = sorted(p.name for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
        there = f"{folder} has {', '.join(have[:10])}" if have else f"{folder} has no files"
        raise InputError(
            f"{path} is not there ({there}){_nearest(path.name, have)}", "mend the path in collect.sources"
        )
    if path.stat().st_size == 0:
        raise InputError(_empty(path), "fill it, or take its entry out of collect.sources")
    return reader(path)


def read_jsonl(path: Path) -> Iterator[Entry]:
    """Yield the rows of a file with one JSON object a line; blank lines are skipped."""
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            content = raw.decode("utf-8", errors="backslashreplace").rstrip("\r\n")
            if content.strip():
                yield Entry(number, content, _parsed_json(raw))


def _parsed_json(raw: bytes) -> Record | BadRow:
    try:
        value = json.loads(raw.decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        return BadRow("not_utf8", f"byte 0x{raw[error.start]:02x} at {error.start + 1}")
    except RecursionError:
        return BadRow("broken_json", "nested too deeply")
    except json.JSONDecodeError as error:
        return BadRow("broken_json", f"{error.msg} at character {error.pos + 1}")
    except ValueError as error:  # a number of thousands of digits
        return BadRow("broken_json", str(error))
    if not isinstance(value, dict):
        return BadRow("broken_json", f"a {type(value).__name__} instead of an object")
    return value


def read_csv(path: Path) -> Iterator[Entry]:
    """Yield the rows of a CSV file with a header; the line is the one that a row ends on."""
    csv.field_size_limit(2**31 - 1)  # the default of 131,072 characters is a short document
    # Bytes that are no UTF-8 survive as surrogates, so that one bad row does not end the file.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        header = next(reader, [])
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Entry(reader.line_num, "", BadRow("broken_csv", str(error)))
                continue
            if cells:
                yield Entry(reader.line_num, _visible(",".join(cells)), _parsed_cells(header, cells))


def _parsed_cells(header: Sequence[str], cells: Sequence[str]) -> Record | BadRow:
    if len(cells) != len(header):
        return BadRow("broken_csv", f"{_count(len(cells), 'cell')} under {_count(len(header), 'column')}")
    for name, cell in zip(header, cells, strict=True):
        if not _is_text(cell):
            return BadRow("not_utf8", f"in column {name}")
    return dict(zip(header, cells, strict=True))


def read_parquet(path: Path) -> Iterator[Entry]:
    """Yield the rows of a Parquet file, a batch at a time.

    Raises:
        InputError: the file is no Parquet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} cannot be read as Parquet: {error}", "write it again") from None
    number = 0
    with file:
        for batch in file.iter_batches(batch_size=BATCH_ROWS):
            for fields in batch.to_pylist():
                number += 1
                yield Entry(number, json.dumps(fields, ensure_ascii=False, default=str), fields)


_READERS: dict[str, Callable[[Path], Iterator[Entry]]] = {
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def check_columns(path: Path, columns: Columns, entries: Iterable[Entry]) -> Iterator[Entry]:
    """Pass the entries on, once it is known that the file can give rows.

    Entries are held back only until one of them has all that is demanded.

    Raises:
        InputError: no row of the file has the columns; the message names the ones there are.
    """
    held: list[Entry] = []
    seen: dict[str, None] = {}
    passing = False
    for entry in entries:
        if passing:
            yield entry
            continue
        held.append(entry)
        if not isinstance(entry.fields, BadRow):
            seen.update(dict.fromkeys(map(str, entry.fields)))
            if not _absent(columns, seen):
                passing = True
                yield from held
                held.clear()
    if held and seen:
        raise _without_columns(path, columns, list(seen))
    yield from held


def _absent(columns: Columns, seen: Iterable[str]) -> list[str]:
    present = set(seen)
    absent = [name for name in columns.demanded if name not in present]
    if columns.messages not in present:
        absent += [name for name in (columns.prompt, columns.completion) if name not in present]
    return absent


def _without_columns(path: Path, columns: Columns, seen: list[str]) -> InputError:
    lines = [f"{path} has no column {name!r}{_nearest(name, seen)}" for name in _absent(columns, seen)]
    return InputError(
        "\n".join(lines) + f"\ncolumns there: {', '.join(seen)}",
        f"name the columns in collect.sources (messages_column, or prompt_column and completion_column), "
        f"or give the file {columns.messages!r}, or {columns.prompt!r} and {columns.completion!r}",
    )


def to_row(
    fields: Record, source: str, license: str, origin: str, columns: Columns, system_prompt: str | None
) -> Row:
    """Turn the fields of one row into a record.

    Raises:
        BadRow: there is nothing to learn from in it.
    """
    messages = (
        _chat(fields[columns.messages])
        if fields.get(columns.messages) not in (None, "")
        else _pair(fields, columns.prompt, columns.completion)
    )
    if system_prompt and messages and messages[0].role != "system":
        messages = [Message("system", system_prompt), *messages]
    problem = conversation_problem(messages)
    if problem:
        raise BadRow("no_answer" if problem.startswith("no answer") else "wrong_messages", problem)
    if not all(_is_text(message.content) for message in messages):
        raise BadRow("not_text", "half of a surrogate pair, which is no character")
    if not any(message.role == "user" and message.content.strip() for message in messages):
        raise BadRow("no_question", "the user says nothing")
    group = fields.get(columns.group) if columns.group else None
    tags = {name: _plain(fields[name]) for name in columns.tags if fields.get(name) not in (None, "")}
    return make_row(
        messages,
        source,
        license,
        group=_plain(group) if group not in (None, "") else None,
        tags=tags,
        origin=origin,
    )


def _pair(fields: Record, prompt: str, completion: str) -> list[Message]:
    for name in (prompt, completion):
        if name not in fields:
            raise BadRow("missing_field", f"no {name!r}{_nearest(name, map(str, fields))}")
    question, answer = fields[prompt], fields[completion]
    if isinstance(answer, dict | list):  # a JSON answer that was not quoted
        answer = json.dumps(answer, ensure_ascii=False, separators=(",", ":"))
    if question is None or (isinstance(question, str) and not question.strip()):
        raise BadRow("no_question", f"{prompt!r} is empty")
    if answer is None or (isinstance(answer, str) and not answer.strip()):
        raise BadRow("no_answer", f"{completion!r} is empty")
    for name, value in ((prompt, question), (completion, answer)):
        if not isinstance(value, str):
            raise BadRow("not_text", f"{name!r} is a {type(value).__name__}")
    return [Message("user", question), Message("assistant", answer)]


def _chat(value: Any) -> list[Message]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRow("wrong_messages", f"no JSON: {error}") from None
    if not isinstance(value, list):
        raise BadRow("wrong_messages", f"a {type(value).__name__} instead of a list")
    messages = []
    for place, turn in enumerate(value, start=1):
        if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
            raise BadRow("wrong_messages", f"message {place} has no role and content: {_short(turn)}")
        if not isinstance(turn["content"], str):
            raise BadRow(
                "wrong_messages", f"the content of message {place} is a {type(turn['content']).__name__}"
            )
        messages.append(Message(str(turn["role"]), turn["content"]))
    return messages


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _visible(text: str) -> str:
    return text.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="backslashreplace")


def _listed(rejected: Sequence[Rejected]) -> str:
    lines = [f"{r.file}:{r.line}: {r.reason}: {r.detail}" for r in rejected[:MAX_SHOWN]]
    if len(rejected) > MAX_SHOWN:
        rest = Counter(r.reason for r in rejected[MAX_SHOWN:])
        lines.append("and " + ", ".join(f"{count} more {reason}" for reason, count in sorted(rest.items())))
    return "\n".join(lines)


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _empty(path: Path) -> str:
    return f"{path} is empty: there is no row in it"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
