"""Read exchanges, feedback and counts from a store, also while others write to it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    Boolean,
    ColumnElement,
    Connection,
    Double,
    Integer,
    Table,
    Text,
    case,
    func,
    literal,
    select,
    tuple_,
)

from services.events.opening import open_database
from services.events.schema import EVENT_FIELDS, TABLES, Event, Exchange, Feedback, exchanges, feedback
from stages.common.artifacts import atomic_write

if TYPE_CHECKING:
    import pyarrow as pa

PAGE_ROWS = 1000  # read by one query
PAGE_TIMES = 20_000  # read by one query of times only
PAGE_CHARS = 16_000_000  # limit of a page's texts
IMPOSSIBLE = {"string": "", "double": math.nan, "int64": -1}  # in the place of a damaged value, by type


def read_exchanges(url: str, start: float, end: float) -> Iterator[pa.RecordBatch]:
    """Yield the exchanges received in [start, end) (unix s), ordered by time; memory is bounded.

    Raises:
        InputError: there is no store at `url`, it has another version, or cannot be read.
    """
    at = exchanges.c.received_at
    yield from _read(url, Exchange, (at >= start) & (at < end), with_feedback=False)


def read_feedback(url: str, start: float, end: float) -> Iterator[pa.RecordBatch]:
    """Yield the feedback given in [start, end) (unix s), ordered by time; see `read_exchanges`."""
    at = feedback.c.given_at
    yield from _read(url, Feedback, (at >= start) & (at < end), with_feedback=False)


def read_joined(url: str, start: float, end: float) -> Iterator[pa.RecordBatch]:
    """Yield exchanges as `read_exchanges`, with a column `feedback`: the list of all feedback on each."""
    at = exchanges.c.received_at
    yield from _read(url, Exchange, (at >= start) & (at < end), with_feedback=True)


def read_times(url: str, start: float, end: float, version: str, role: str) -> Iterator[float]:
    """Yield the times at which a version received exchanges in a role, in [start, end), in order.

    Raises:
        InputError: as `read_exchanges`.
    """
    key, at = exchanges.c.request_id, exchanges.c.received_at
    wanted = select(at, key).where(at >= start, at < end, *_match_model(version, role))
    wanted = wanted.order_by(at, key).limit(PAGE_TIMES)
    after: tuple[float, str] | None = None
    with open_database(url) as engine:
        while True:
            page = wanted
            if after is not None:
                page = wanted.where(tuple_(at, key) > tuple_(literal(after[0]), literal(after[1])))
            with engine.connect() as connection:
                rows = connection.execute(page).all()
            yield from (row[0] for row in rows)
            if len(rows) < PAGE_TIMES:
                return
            after = rows[-1][0], rows[-1][1]


def count_exchanges(url: str, start: float, end: float, version: str, role: str) -> int:
    """Return the number of exchanges that `read_times` would yield.

    Raises:
        InputError: as `read_exchanges`.
    """
    at = exchanges.c.received_at
    wanted = select(func.count()).where(at >= start, at < end, *_match_model(version, role))
    with open_database(url) as engine, engine.connect() as connection:
        return int(connection.execute(wanted).scalar_one())


def read_time_span(url: str) -> tuple[float, float] | None:
    """Return the times of the first and the last exchange (unix s); None for an empty store.

    Raises:
        InputError: as `read_exchanges`.
    """
    at = exchanges.c.received_at
    with open_database(url) as engine, engine.connect() as connection:
        # Two queries, each of one step in the index: one query for both ends would scan it.
        first, last = (
            connection.execute(select(at).order_by(order).limit(1)).scalar_one_or_none()
            for order in (at.asc(), at.desc())
        )
    return None if first is None or last is None else (float(first), float(last))


@dataclass(frozen=True, slots=True)
class Traffic:
    """Counts of exchanges and feedback in [start, end) (unix s), without shadows.

    Attributes:
        refused: exchanges with status 4xx.
        failed: exchanges with status 5xx.
        checked: answers whose schema was checked.
        valid: checked answers that fit the schema.
        versions: exchanges by version.
    """

    start: float
    end: float
    requests: int
    refused: int
    failed: int
    checked: int
    valid: int
    thumbs_up: int
    thumbs_down: int
    corrections: int
    versions: dict[str, int]


def count_traffic(url: str, spans: Iterable[tuple[float, float]]) -> Iterator[Traffic]:
    """Yield the counts of each [start, end) (unix s), lazily; no texts are read.

    Raises:
        InputError: as `read_exchanges`.
    """
    at, status, valid = exchanges.c.received_at, exchanges.c.status, exchanges.c.valid_output
    sums = [
        func.count(),
        func.sum(case((status.between(400, 499), 1), else_=0)),
        func.sum(case((status >= 500, 1), else_=0)),
        func.count(valid),
        func.sum(case((valid.is_(True), 1), else_=0)),
    ]
    wanted = select(exchanges.c.version, *sums).where(exchanges.c.role != "shadow")
    wanted = wanted.group_by(exchanges.c.version)
    thumb, given = feedback.c.thumb, feedback.c.given_at
    feedback_sums = select(
        func.sum(case((thumb == 1, 1), else_=0)),
        func.sum(case((thumb == -1, 1), else_=0)),
        func.count(feedback.c.correction),
    )
    with open_database(url) as engine, engine.connect() as connection:
        for start, end in spans:
            rows = connection.execute(wanted.where(at >= start, at < end)).all()
            feedback_row = connection.execute(feedback_sums.where(given >= start, given < end)).one()
            connection.rollback()  # a long transaction would block SQLite's checkpoints
            requests, refused, failed, checked, valid_ones = (
                sum(int(row[place]) for row in rows) for place in range(1, 6)
            )
            up, down, corrections = (int(value or 0) for value in feedback_row)
            versions = {str(row[0]): int(row[1]) for row in rows}
            yield Traffic(
                start, end, requests, refused, failed, checked, valid_ones, up, down, corrections, versions
            )


def _match_model(version: str, role: str) -> tuple[Any, Any]:
    return exchanges.c.version == version, exchanges.c.role == role


def get_joined_schema() -> pa.Schema:
    """Return the columns of `read_joined`."""
    import pyarrow as pa

    entry = pa.struct([field for field in _schema(feedback) if field.name != "request_id"])
    return _schema(exchanges).append(pa.field("feedback", pa.list_(entry), nullable=False))


def _schema(table: Table) -> pa.Schema:
    import pyarrow as pa

    types = {Text: pa.string(), Double: pa.float64(), Integer: pa.int64(), Boolean: pa.bool_()}
    return pa.schema(
        [pa.field(c.name, types[type(c.type)], nullable=bool(c.nullable)) for c in table.columns]
    )


def _read(
    url: str, kind: type[Event], selected: ColumnElement[bool], with_feedback: bool
) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    schema = get_joined_schema() if with_feedback else _schema(TABLES[kind])
    with open_database(url) as engine:
        after: tuple[float, str] | None = None
        while True:
            # One transaction per page: a long one would block SQLite's checkpoints.
            with engine.connect() as connection:
                rows = _page(connection, kind, selected, after)
                given = (
                    _read_feedback_on(connection, [row[0] for row in rows]) if with_feedback and rows else {}
                )
            if not rows:
                return
            columns: list[Any] = list(zip(*rows, strict=True))
            after = columns[_time_column(kind)][-1], columns[0][-1]
            if with_feedback:
                columns.append([given.get(row[0], []) for row in rows])
            arrays = [_make_array(values, field) for values, field in zip(columns, schema, strict=True)]
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def _make_array(values: Sequence[Any], field: pa.Field) -> pa.Array:
    """Return a column; in the place of a value of another type, which SQLite may hold, is an impossible one.

    `monitoring.traffic.windows.find_problem` finds it: one damaged row must not end all reading.
    """
    import pyarrow as pa

    try:
        return pa.array(values, field.type)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return pa.array([_fit(value, field) for value in values], field.type)


def _fit(value: Any, field: pa.Field) -> Any:
    import pyarrow as pa

    if pa.types.is_list(field.type):
        return [one for one in value if _holds(one, field.type.value_type)]
    if _holds(value, field.type):
        return value
    return None if field.nullable else IMPOSSIBLE[str(field.type)]


def _holds(value: Any, type: pa.DataType) -> bool:
    import pyarrow as pa

    try:
        pa.array([value], type)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return False
    return True


def _time_column(kind: type[Event]) -> int:
    return EVENT_FIELDS[kind].index("received_at" if kind is Exchange else "given_at")


def _page(
    connection: Connection, kind: type[Event], selected: ColumnElement[bool], after: tuple[float, str] | None
) -> list[tuple[Any, ...]]:
    table = TABLES[kind]
    key, at = table.columns[0], table.columns[_time_column(kind)]
    wanted = select(table).where(selected).order_by(at, key).limit(PAGE_ROWS)
    if after is not None:
        wanted = wanted.where(tuple_(at, key) > tuple_(literal(after[0]), literal(after[1])))
    rows: list[tuple[Any, ...]] = []
    chars = 0
    with connection.execute(wanted.execution_options(yield_per=100)) as result:
        for row in result:
            rows.append(tuple(row))
            chars += sum(len(value) for value in row if type(value) is str)
            if chars > PAGE_CHARS:
                break
    return rows


def _read_feedback_on(connection: Connection, request_ids: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    wanted = select(feedback).where(feedback.c.request_id.in_(request_ids))
    found: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in connection.execute(wanted.order_by(feedback.c.given_at, feedback.c.feedback_id)).mappings():
        found[row["request_id"]].append({name: row[name] for name in row if name != "request_id"})
    return found


def export_window(url: str, start: float, end: float, path: Path) -> int:
    """Write the rows of `read_joined` to a Parquet file; return the number of exchanges.

    Raises:
        InputError: as `read_exchanges`.
    """
    at = exchanges.c.received_at
    return export_selected(url, (at >= start) & (at < end), path)


def export_selected(url: str, selected: ColumnElement[bool], path: Path) -> int:
    """Write the exchanges of a condition as `export_window` does; return their number.

    Raises:
        InputError: as `read_exchanges`.
    """
    import pyarrow.parquet as pq

    rows = 0
    with (
        atomic_write(path) as temporary,
        pq.ParquetWriter(temporary, get_joined_schema(), compression="zstd") as writer,
    ):
        for batch in _read(url, Exchange, selected, with_feedback=True):
            writer.write_batch(batch)
            rows += batch.num_rows
    return rows
