"""Texts of users in Evidently's report: they are shown, and do not run."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from monitoring.verdicts import DriftVerdict
from stages.common.escaping import escape_script_json, escape_widget

if TYPE_CHECKING:
    import pyarrow as pa

# Evidently's page holds its scripts and styles in itself; it may make no request at all.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:; worker-src blob:"
)
_DATA = re.compile(r"\s*var \w+ = ([{\[].*);\s*")


def close_page(page: str) -> str:
    """Return Evidently's page so that no string of its data ends a script, and no script makes a request."""
    # Evidently writes its data as JSON into a script, one line a variable, and does not escape it.
    lines = (escape_script_json(line) if _is_data(line) else line for line in page.split("\n"))
    meta = f'<head><meta http-equiv="Content-Security-Policy" content="{PAGE_POLICY}">'
    return "\n".join(lines).replace("<head>", meta, 1)


def _is_data(line: str) -> bool:
    if (found := _DATA.fullmatch(line)) is None:
        return False
    try:
        json.loads(found[1])
    except ValueError:
        return False  # a line of the library
    return True


def escape_texts(verdict: DriftVerdict, tables: Sequence[pa.Table]) -> tuple[DriftVerdict, list[pa.Table]]:
    """Return verdict and tables with columns, categories and sentences as text that a page can hold.

    Keys of JSON answers are names of columns, and their values are categories: anyone can choose both.
    """
    names: dict[str, str] = {}
    columns = [change.column for one in verdict.drift_types for change in one.columns]
    for column in [*columns, *(name for table in tables for name in table.column_names)]:
        if column not in names:
            name = escape_widget(column)
            while name in names.values():
                name += "·"
            names[column] = name
    drift_types = tuple(
        replace(
            one,
            columns=tuple(
                replace(
                    change,
                    column=names[change.column],
                    before=escape_widget(change.before),
                    after=escape_widget(change.after),
                    summary=escape_widget(change.summary),
                )
                for change in one.columns
            ),
        )
        for one in verdict.drift_types
    )
    escaped = replace(
        verdict, drift_types=drift_types, why_not=verdict.why_not and escape_widget(verdict.why_not)
    )
    return escaped, [_escape_table(table, names) for table in tables]


def _escape_table(table: pa.Table, names: dict[str, str]) -> pa.Table:
    import pyarrow as pa

    for position, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            column = table.column(position).combine_chunks().dictionary_encode()
            values = pa.array([escape_widget(value.as_py()) for value in column.dictionary], pa.string())
            escaped = values.take(column.indices) if len(values) else column.cast(pa.string())
            table = table.set_column(position, field, escaped)
    return table.rename_columns([names[name] for name in table.column_names])
