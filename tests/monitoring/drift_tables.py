"""Small feature tables for the tests of drift."""

import numpy as np
import pyarrow as pa

from monitoring.traffic.columns import VECTOR_SIZE, Column, build_table_schema

COLUMNS = (
    Column("length", "input", "number", None, "characters", ""),
    Column("language", "input", "category", None, "", ""),
    Column("wording_vector", "input", "vector", None, "", ""),
    Column("valid", "quality", "flag", "down", "", ""),
    Column("wait_s", "service", "number", None, "s", ""),
)


def table(seed, sessions=200, each=5, columns=COLUMNS, names="s", first_at=0.0, **given):
    """Traffic of alike sessions; `given` replaces columns by values for each row, in order of session."""
    rng = np.random.default_rng(seed)
    rows = sessions * each
    session = np.repeat(np.arange(sessions), each)
    centres = np.random.default_rng(0).standard_normal((4, VECTOR_SIZE))
    topic = np.repeat(rng.integers(0, 4, sessions), each)
    vectors = centres[topic] + rng.standard_normal((rows, VECTOR_SIZE))
    values = {
        "length": np.round(rng.normal(30, 6, rows) + rng.normal(0, 5, sessions)[session]),
        "language": np.where(rng.random(rows) < 0.02, "nl", "en"),
        "wording_vector": vectors,
        "valid": (rng.random(rows) < 0.95).astype(float),
        "wait_s": rng.exponential(1.0, rows),
        **given,
    }
    arrays = [
        pa.array([f"r{place}" for place in range(rows)]),
        pa.array(first_at + np.arange(rows, dtype=float)),
        pa.array([f"{names}{seed}-{place}" for place in session]),
        pa.array(["v"] * rows),
    ]
    for column in columns:
        value = values[column.name]
        if column.kind == "vector":
            unit = np.asarray(value) / np.linalg.norm(value, axis=1, keepdims=True)
            flat = pa.array(unit.astype(np.float32).ravel())
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, VECTOR_SIZE))
        else:
            arrays.append(pa.array(value, from_pandas=True))
    return pa.Table.from_arrays(arrays, schema=build_table_schema(columns))


def pages(whole, rows=128):
    """The same table a page at a time."""
    return [whole.slice(first, rows) for first in range(0, whole.num_rows, rows)]
