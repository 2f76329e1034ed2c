"""Parquet: rows a batch at a time, with the class names that Hugging Face keeps in the metadata."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from stages.common.errors import InputError
from stages.common.sources.files.encodings import detect_compression, open_decompressed
from stages.common.sources.files.entries import Entry

BATCH_ROWS = 1000  # each of which may hold a passage
BUFFER_BYTES = 1 << 20


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
        number = 0
        for batch in file.iter_batches(batch_size=BATCH_ROWS):
            for fields in batch.to_pylist():
                number += 1
                named = _name_classes(fields, classes)
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
