"""Bytes to text: decompress, and detect the encoding.

What is certain is detected for every run: a byte order mark, UTF-16 by its NUL bytes, valid UTF-8. A legacy
code page can only be guessed: `guess_encoding` is for the person who then writes it into `params.yaml`.
"""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, cast

from stages.common.errors import InputError

CHUNK_BYTES = 1 << 20
GUESS_BYTES = 1 << 16

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16: its mark begins with the one of UTF-16 LE
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# The code pages that spreadsheets and old databases write, most common first.
CODE_PAGES = (
    "cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp932", "gb18030",
    "big5", "cp949", "koi8_r", "mac_roman",
)  # fmt: skip
NOT_TEXT = (
    (b"PK\x03\x04", "a ZIP archive (an .xlsx workbook is one too)", "unpack it, or export it as CSV"),
    (b"\xd0\xcf\x11\xe0", "an Excel workbook", "export it as CSV"),
    (b"BZh", "compressed with bzip2", "decompress it, or compress it with gzip or zstd"),
    (b"\xfd7zXZ", "compressed with xz", "decompress it, or compress it with gzip or zstd"),
    (b"%PDF", "a PDF", "extract rows of questions and answers from it first"),
    (b"SQLite format 3", "an SQLite database", "export its table as CSV"),
    (b"<!DOCTYPE", "an HTML page", "download the file itself; a page may ask you to sign in"),
    (b"<!doctype", "an HTML page", "download the file itself; a page may ask you to sign in"),
    (b"<html", "an HTML page", "download the file itself; a page may ask you to sign in"),
    (b"ARROW1", "an Arrow file", "write it as Parquet"),
)


def detect_compression(path: Path) -> str | None:
    """Return "gzip", "zstd" or None, from the first bytes and not from the name."""
    with path.open("rb") as file:
        head = file.read(4)
    if head.startswith(GZIP_MAGIC):
        return "gzip"
    return "zstd" if head == ZSTD_MAGIC else None


@contextmanager
def open_decompressed(path: Path) -> Iterator[BinaryIO]:
    """Open the content of a file, decompressed.

    Raises:
        InputError: the compressed data are damaged or end early.
    """
    compression = detect_compression(path)
    try:
        if compression == "gzip":
            with gzip.open(path) as content:
                yield cast(BinaryIO, content)
        elif compression == "zstd":
            import pyarrow as pa  # Python has zstd only from 3.14 on

            with (
                pa.OSFile(str(path)) as raw,
                io.BufferedReader(pa.CompressedInputStream(raw, "zstd")) as content,
            ):
                yield content
        else:
            with path.open("rb") as content:
                yield content
    except (EOFError, OSError, zlib.error) as error:
        if compression is None:
            raise
        raise InputError(
            f"{path} cannot be decompressed with {compression}: {error}", "copy or compress the file again"
        ) from None


def refuse_binary(path: Path, head: bytes) -> None:
    """Raise an InputError if `head`, the first bytes of the content, belong to a format without text rows."""
    for magic, what, fix in NOT_TEXT:
        if head.startswith(magic):
            raise InputError(f"{path} is {what}, which is not supported", fix)


def detect_encoding(path: Path) -> str | None:
    """Return the encoding where the bytes leave no doubt, and None where they do not.

    A file with broken rows is still UTF-8 if it has more valid multi-byte characters than invalid bytes.
    """
    with open_decompressed(path) as content:
        head = content.read(CHUNK_BYTES)
        for mark, encoding in BYTE_ORDER_MARKS:
            if head.startswith(mark):
                return encoding
        if wide := _detect_utf16(head[:4096]):
            return wide
        valid, invalid = _count_multibyte(head, content)
    return "utf-8" if invalid == 0 or valid > invalid else None


def _detect_utf16(head: bytes) -> str | None:
    """Return UTF-16 without a mark by where the NUL bytes of its ASCII characters are."""
    even, odd = head[0::2].count(0), head[1::2].count(0)
    half = max(1, len(head) // 2)
    if odd > 0.4 * half and even < 0.05 * half:
        return "utf-16-le"
    if even > 0.4 * half and odd < 0.05 * half:
        return "utf-16-be"
    return None


def _count_multibyte(head: bytes, rest: IO[bytes]) -> tuple[int, int]:
    """Return how many characters of several bytes are valid UTF-8, and how many bytes are not."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
    valid = invalid = 0
    chunk = head
    while chunk:
        following = rest.read(CHUNK_BYTES)
        if not chunk.isascii() or decoder.getstate()[0]:
            text = decoder.decode(chunk, final=not following)
            escaped = len(text) - len(text.encode("utf-8", errors="ignore").decode())
            invalid += escaped
            valid += len(text) - len(text.encode("ascii", errors="ignore")) - escaped
        chunk = following
    return valid, invalid


def guess_encoding(path: Path) -> str:
    """Return the likeliest code page of a file that is not UTF-8, judged on its lines that are not ASCII."""
    from charset_normalizer import from_bytes

    sample = b""
    with open_decompressed(path) as content:
        for line in content:
            if not line.isascii():
                sample += line
            if len(sample) > GUESS_BYTES:
                break
    best = from_bytes(sample, cp_isolation=list(CODE_PAGES)).best()
    if best is None:
        return "cp1252"
    try:
        # Two code pages that agree on every byte here are the same text: name the common one.
        return "cp1252" if sample.decode("cp1252") == sample.decode(best.encoding) else best.encoding
    except UnicodeDecodeError:
        return best.encoding


def check_encoding(encoding: str, path: Path) -> str:
    """Return the name of an encoding given by the user if Python has it.

    Raises:
        InputError: there is no such encoding of text.
    """
    try:
        codecs.lookup(encoding)
        "".encode(encoding)
    except (LookupError, ValueError):
        raise InputError(
            f"{path}: unknown encoding {encoding!r}", "use a name such as utf-8, utf-16, cp1252, latin-1"
        ) from None
    return encoding


@contextmanager
def open_text(path: Path, encoding: str, newline: str) -> Iterator[io.TextIOWrapper]:
    """Open the decompressed content as text; undecodable bytes become lone surrogates.

    Raises:
        InputError: bytes that UTF-16, UTF-32 or an East Asian encoding cannot be resumed after.
    """
    wide = encoding.lower().replace("_", "-").startswith(("utf-16", "utf-32", "utf16", "utf32"))
    errors = "strict" if wide else "surrogateescape"
    try:
        with (
            open_decompressed(path) as content,
            io.TextIOWrapper(content, encoding=encoding, errors=errors, newline=newline) as text,
        ):
            yield text
    except UnicodeError as error:
        raise InputError(
            f"{path} is not {encoding}: {error}", "set `encoding` in its entry of collect.sources"
        ) from None
