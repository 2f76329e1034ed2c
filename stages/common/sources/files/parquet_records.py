"""Parquet: rows a batch at a time, with the class names that Hugging Face keeps in the metadata.

A column of objects has one list of keys for all rows, and null where a row has not the key. Hugging Face's
`datasets` writes conversations with tools so, or as Arrow's type of JSON texts (since its version 4.7).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from stages.common.errors import InputError
from stages.common.sources.files.encodings import detect_compression, open_decompressed
from stages.common.sources.files.entries import Entry
from stages.common.sources.files.strict_json import decode_json
from stages.common.sources.files.tools.schemas import TOOL_NAMES

BATCH_ROWS = 1000  # each of which may hold a passage
BUFFER_BYTES = 1 << 20
CALL_FIELDS = frozenset(("name", "arguments"))

Convert = Callable[[Any], Any]  # a value of a column to the one that was written


def read_parquet(path: Path) -> Iterator[Entry]:
    """Yield the rows of a Parquet file; the line is the row's number, from 1.

    Raises:
        InputError: the file is not Parquet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with ExitStack() as stack:
        source: Any = path
        if detect_compression(path):
            # Parquet is read from its end. The copy has no name, so that nothing is left of it.
            source = stack.enter_context(tempfile.TemporaryFile(dir=".", prefix=".perennial-parquet-"))
            with open_decompressed(path) as content:
                shutil.copyfileobj(content, source, BUFFER_BYTES)
        try:
            # Page by page: a file may be one group of all its rows.
            file = stack.enter_context(pq.ParquetFile(source, buffer_size=BUFFER_BYTES, pre_buffer=False))
        except pa.ArrowInvalid as error:
            raise InputError(f"{path} cannot be read as Parquet: {error}", "write the file again") from None
        classes = read_class_names(file.schema_arrow.metadata or {})
        converts = _list_converts(file.schema_arrow)
        number = 0
        for batch in file.iter_batches(batch_size=BATCH_ROWS):
            for fields in batch.to_pylist():
                number += 1
                named = _name_classes(fields, classes)
                named |= {column: convert(named[column]) for column, convert in converts.items()}
                yield Entry(number, json.dumps(named, ensure_ascii=False, default=str), named)


def read_class_names(metadata: Mapping[bytes, bytes]) -> dict[str, Sequence[str]]:
    """Return the names of the classes by column, from the `ClassLabel` features of Hugging Face datasets."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {
            column: feature["names"]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
        }
    except (KeyError, TypeError, ValueError):
        return {}


def _name_classes(fields: dict[str, Any], classes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    for column, names in classes.items():
        value = fields.get(column)
        if isinstance(value, int) and 0 <= value < len(names):
            fields[column] = names[value]
    return fields


def _list_converts(schema: Any) -> dict[str, Convert]:
    """Return how the values of columns are converted, for those that need it."""
    found = {field.name: _choose_convert(field.type, field.name in TOOL_NAMES) for field in schema}
    return {name: convert for name, convert in found.items() if convert is not None}


def _choose_convert(kind: Any, is_padded: bool) -> Convert | None:
    """Return how values of an Arrow type are converted; None where they stay as they are.

    Args:
        is_padded: whether a null in an object is a key of other rows: so in tools, and in arguments of calls.
    """
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        return _decode if kind.extension_name == "arrow.json" else None
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = _choose_convert(kind.value_type, is_padded)
        return inner and (lambda value: None if value is None else [inner(item) for item in value])
    if not pa.types.is_struct(kind):
        return None
    fields = {field.name: field.type for field in kind}
    is_call = fields.keys() >= CALL_FIELDS
    found = {
        name: _choose_convert(one, is_padded or (is_call and name == "arguments"))
        for name, one in fields.items()
    }
    converts = {name: convert for name, convert in found.items() if convert is not None}
    return _make_object_convert(converts, is_padded) if converts or is_padded else None


def _make_object_convert(converts: Mapping[str, Convert], is_padded: bool) -> Convert:
    def convert(value: Any) -> Any:
        if value is None:
            return None
        kept = {key: item for key, item in value.items() if item is not None} if is_padded else value
        return {key: converts[key](item) if key in converts else item for key, item in kept.items()}

    return convert


def _decode(text: Any) -> Any:
    """Return the value of a JSON text; what is none stays a text."""
    try:
        return decode_json(text) if isinstance(text, str) else text
    except ValueError:
        return text
