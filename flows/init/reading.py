"""Find the user's files, detect their format, and read their rows."""

from __future__ import annotations

import filecmp
import logging
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stages.common.artifacts import atomic_write
from stages.common.errors import InputError
from stages.common.logs import show_count
from stages.common.sources import Collected
from stages.common.sources.files.encodings import guess_encoding
from stages.common.sources.files.entries import Record
from stages.common.sources.files.formats import (
    SUFFIXES,
    FormatOptions,
    detect_format,
    get_inner_suffix,
    read_entries,
)
from stages.common.sources.files.rows import collect_file, read_fields, sample_entries
from stages.common.sources.files.shapes import Columns, detect_shape

logger = logging.getLogger("flows.init")

DATA = Path("data")  # DVC watches this folder
FEEDBACK = DATA / "feedback"  # written by the retraining flow
SESSIONS = ("session_id", "conversation_id", "thread_id")  # columns, likeliest first
MIN_CONTEXT_SHARE = 0.9  # of the first rows have a passage
MIN_ROWS_A_PASSAGE = 1.5  # on average
MIN_GROUPS = 20  # fewer sessions or passages are too few to split


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file of rows.

    Attributes:
        origin: where it is; path: where it is, or is to be copied to, under data/.
        options, columns: what the user gave, with the encoding where it had to be guessed.
        is_guessed: whether it had to be.
        collected: its rows, the rejected ones, and what was detected.
    """

    origin: Path
    path: Path
    options: FormatOptions
    columns: Columns
    is_guessed: bool
    collected: Collected

    def as_entry(self, license: str, origin: str) -> dict[str, Any]:
        """Return the entry of collect.sources that reads the file in the same way."""
        entry: dict[str, Any] = {"kind": "file", "path": self.path.as_posix(), "license": license}
        if origin != "human":
            entry["origin"] = origin
        given = {
            "format": self.options.format,
            "encoding": self.options.encoding,
            "delimiter": self.options.delimiter,
            "records_key": self.options.records_key,
            "column_names": list(self.options.column_names),
        }
        entry |= {key: value for key, value in given.items() if value}
        entry["shape"] = self.collected.metrics["shape"]
        found = self.collected.metrics["columns"]
        entry |= {f"{part}_column": name for part, name in found.items() if part != "history"}
        if self.columns.group:
            entry["group_column"] = self.columns.group
        if self.columns.tags:
            entry["tag_columns"] = list(self.columns.tags)
        return entry


def find_files(data: Path) -> list[Path]:
    """Return the files of rows at a path: the file itself, or all in the folder, in the order of their names.

    Raises:
        InputError: the folder has none, or is a whole checkout.
    """
    if (data / "params.yaml").is_file():
        raise InputError(
            f"{data} is a checkout and not data", "give a file or a folder of rows, such as data/support.csv"
        )
    if not data.is_dir():
        return [data]
    files = sorted(
        path
        for path in data.rglob("*")
        if path.is_file()
        and get_inner_suffix(path) in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(data).parts)
        and not path.resolve().is_relative_to(FEEDBACK.resolve())
    )
    if not files:
        raise InputError(
            f"{data} has no file of rows",
            f"give a folder with files of {', '.join(SUFFIXES)} (also .gz, .zst)",
        )
    return files


def read_data_files(
    paths: Sequence[Path],
    folder: Path | None,
    license: str,
    origin: str,
    options: FormatOptions,
    columns: Columns,
) -> list[DataFile]:
    """Read files, each in its own format and shape.

    Args:
        folder: the folder that they were found in, whose structure is kept under data/.

    Raises:
        InputError: one cannot be read, or has no good row; the fix names options of the command.
    """
    files = []
    for path in paths:
        try:
            files.append(_read_data_file(path, folder, license, origin, options, columns))
        except InputError as error:
            raise InputError(error.what, name_options(error.fix)) from None
    return files


def _read_data_file(
    path: Path, folder: Path | None, license: str, origin: str, options: FormatOptions, columns: Columns
) -> DataFile:
    format = detect_format(path, options)
    is_guessed = not format.is_certain
    if is_guessed:
        options = replace(options, encoding=guess_encoding(path))
        format = detect_format(path, options)
    if columns.group is None:
        records = read_fields(sample_entries(read_entries(path, format))[0])
        columns = replace(columns, group=find_group(path, records, columns))
    collected = collect_file(
        path,
        license,
        origin,
        options,
        columns,
        None,
        "reject",
        lambda done: show_count(logger, done, f"rows of {path} read"),
    )
    return DataFile(path, find_data_path(path, folder), options, columns, is_guessed, collected)


def find_group(path: Path, records: Sequence[Record], columns: Columns) -> str | None:
    """Return the column whose rows belong to one side of the split: of sessions, or of passages; or None."""
    return find_sessions(records) or find_passages(path, records, columns)


def find_sessions(records: Sequence[Record]) -> str | None:
    """Return the column that names the session of a row, if several rows share one; None if there is none.

    Turns of one session follow from each other: what is tested must not be next to what was learned.
    """
    for wanted in SESSIONS:
        for name in {name: None for record in records for name in record}:
            if re.sub(r"[^a-z]", "", str(name).lower()) != wanted.replace("_", ""):
                continue
            cells = (record.get(name) for record in records)
            found = Counter(cell for cell in cells if isinstance(cell, str | int) and cell != "")
            if found.total() > len(found) >= MIN_GROUPS:
                return name
    return None


def find_passages(path: Path, records: Sequence[Record], columns: Columns) -> str | None:
    """Return the column of passages that several rows have in common; None if there is none.

    Questions about one passage belong to one side of the split: apart they are near duplicates, of which
    `split` removes those in training.
    """
    context = detect_shape(path, records, columns).context if records else None
    if context is None:
        return None
    cells = (record.get(context) for record in records)
    texts = Counter(cell for cell in cells if isinstance(cell, str) and cell.strip())
    rows = texts.total()
    is_shared = rows > MIN_CONTEXT_SHARE * len(records) and rows > MIN_ROWS_A_PASSAGE * len(texts)
    return context if is_shared and len(texts) >= MIN_GROUPS else None


def name_options(fix: str) -> str:
    """Return a fix that names keys of `params.yaml` with the options of the command in their place."""
    fix = re.sub(r"`(\w+)(?:: ([\w-]+))?`", _as_option, fix)
    return re.sub(r" in its entry of (collect\.sources|the sources)", "", fix)


def _as_option(key: re.Match[str]) -> str:
    value = f" {key.group(2)}" if key.group(2) else ""
    return f"--{key.group(1).replace('_', '-')}{value}"


def find_data_path(path: Path, folder: Path | None) -> Path:
    """Return where a file is under data/, relative to the project, or where it would be copied to."""
    inside = path.resolve()
    root = DATA.resolve()
    if inside.is_relative_to(root):
        return DATA / inside.relative_to(root)
    return DATA / (folder.resolve().name / path.relative_to(folder) if folder else path.name)


def copy_under_data(file: DataFile) -> bool:
    """Copy a file under data/ if it is elsewhere; return whether it was.

    Raises:
        InputError: another file has its name there.
    """
    check_copy(file)
    if file.path.exists():
        return False
    with atomic_write(file.path) as copy:
        shutil.copyfile(file.origin, copy)
    return True


def check_copy(file: DataFile) -> None:
    """Raise an InputError if another file has the name under data/ that this one would get."""
    if not file.path.exists() or file.path.samefile(file.origin):
        return
    if not filecmp.cmp(file.origin, file.path, shallow=False):
        raise InputError(
            f"{file.origin} cannot be copied: {file.path} exists and is another file",
            "rename one of them, or remove the old one",
        )
