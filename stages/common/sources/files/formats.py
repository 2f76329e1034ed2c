"""Detect the format of a file, and read its raw records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stages.common.errors import InputError
from stages.common.params.checked_yaml import suggest_nearest
from stages.common.sources.files.csv_dialect import detect_dialect
from stages.common.sources.files.csv_records import Dialect, read_csv
from stages.common.sources.files.encodings import (
    check_encoding,
    detect_compression,
    detect_encoding,
    open_decompressed,
    open_text,
    refuse_binary,
)
from stages.common.sources.files.entries import Entry
from stages.common.sources.files.json_documents import read_json
from stages.common.sources.files.json_records import is_json_document, read_jsonl
from stages.common.sources.files.parquet_records import read_parquet

Kind = Literal["jsonl", "json", "csv", "parquet"]

SUFFIXES: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".tab": "csv",
    ".psv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
COMPRESSED_SUFFIXES = (".gz", ".gzip", ".zst", ".zstd")
SAMPLE_CHARS = 1 << 20
PARQUET_MAGIC = b"PAR1"


@dataclass(frozen=True, slots=True)
class FormatOptions:
    """What the entry of a source gives of its format; None is detected."""

    format: Kind | None = None
    encoding: str | None = None
    delimiter: str | None = None
    records_key: str | None = None
    column_names: tuple[str, ...] = ()

    @classmethod
    def of(cls, entry: Any) -> FormatOptions:
        """Return the options of an entry, or of the command `init`, whose options have the entry's keys."""
        return cls(entry.format, entry.encoding, entry.delimiter, entry.records_key, entry.column_names)


@dataclass(frozen=True, slots=True)
class FileFormat:
    """How a file is read.

    Attributes:
        kind: csv for every delimiter.
        encoding: of the text; None for Parquet.
        is_certain: false if the text is not UTF-8 and no encoding was given: its other bytes are rejected.
        dialect: of delimited text; column_names: of such a text without a header.
        records_key: of a JSON object with several arrays.
    """

    kind: Kind
    compression: str | None
    encoding: str | None
    is_certain: bool = True
    dialect: Dialect | None = None
    records_key: str | None = None
    column_names: tuple[str, ...] = ()


def detect_format(path: Path, options: FormatOptions | None = None) -> FileFormat:
    """Return the format of a file; options take the place of detection.

    Raises:
        InputError: the file is missing, empty, of an unknown or binary format, or ambiguous.
    """
    options = options or FormatOptions()
    _check_there(path)
    compression = detect_compression(path)
    with open_decompressed(path) as content:
        head = content.read(4096)
    if not head:
        raise report_empty(path)
    if head.startswith(PARQUET_MAGIC):
        return FileFormat("parquet", compression, None)
    refuse_binary(path, head)
    suffix = get_inner_suffix(path)
    kind = options.format or SUFFIXES.get(suffix)
    if kind is None:
        raise InputError(
            f"{path}: the format of {suffix or 'a file without a suffix'!r} is unknown",
            f"use {', '.join(SUFFIXES)} (also .gz, .zst), or set `format` in its entry of collect.sources",
        )
    if kind == "parquet":
        return FileFormat("parquet", compression, None)
    detected = check_encoding(options.encoding, path) if options.encoding else detect_encoding(path)
    encoding = detected or "utf-8"
    dialect = None
    if kind == "csv":
        _refuse_json(path, head)
        sample = _read_sample(path, encoding)
        dialect = detect_dialect(sample, path, options.delimiter, options.column_names)
    elif options.format is None:
        kind = "json" if is_json_document(_read_sample(path, encoding), suffix) else "jsonl"
    is_certain = detected is not None
    return FileFormat(
        kind, compression, encoding, is_certain, dialect, options.records_key, options.column_names
    )


def read_entries(path: Path, format: FileFormat) -> Iterator[Entry]:
    """Yield the raw records of a file in its order, good and bad."""
    if format.kind == "parquet":
        return read_parquet(path)
    encoding = format.encoding or "utf-8"
    if format.kind == "jsonl":
        return read_jsonl(path, encoding)
    if format.kind == "json":
        return read_json(path, encoding, format.records_key)
    return read_csv(path, encoding, format.dialect or Dialect(), format.column_names)


def get_inner_suffix(path: Path) -> str:
    """Return the suffix of a file's format in small letters: ".csv" for rows.csv.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def report_empty(path: Path) -> InputError:
    """Return the error for a file without a row."""
    return InputError(f"{path} is empty: it has no row", "fill it, or remove its entry from collect.sources")


def _check_there(path: Path) -> None:
    if path.is_file():
        if path.stat().st_size == 0:
            raise report_empty(path)
        return
    folder = path.parent
    have = sorted(p.name for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
    there = f"{folder} has {', '.join(have[:10])}" if have else f"{folder} has no files"
    raise InputError(
        f"{path} does not exist ({there}){suggest_nearest(path.name, have)}",
        "correct the path in collect.sources",
    )


def _refuse_json(path: Path, head: bytes) -> None:
    """Raise an InputError if a file named as delimited text begins with a JSON object."""
    first = head.lstrip(b"\xef\xbb\xbf \r\n").split(b"\n")[0].rstrip()
    if first.startswith(b"{") and first.endswith(b"}"):
        raise InputError(
            f"{path} has JSON objects, not delimited text",
            "name it .jsonl, or set `format: jsonl` in its entry of collect.sources",
        )


def _read_sample(path: Path, encoding: str) -> str:
    """Return the first characters of a text, up to the end of a line if there is more."""
    with open_text(path, encoding, newline="") as text:
        sample = text.read(SAMPLE_CHARS)
        if not text.read(1):
            return sample
    return sample[: sample.rfind("\n") + 1] or sample
