"""Report the failed expectations: as records, as a message and as a page."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.common.page.shared import read_tokens
from stages.common.records import Row, format_canonical_json
from stages.validate.suite import ExpectationResult, to_plain

if TYPE_CHECKING:
    import pandas as pd

TEMPLATE = Path(__file__).with_name("page.html.j2")


def list_failures(
    results: Sequence[ExpectationResult], table: pd.DataFrame, rows: Sequence[Row], limit: int
) -> list[dict[str, Any]]:
    """Return each failed expectation with at most `limit` of its unexpected rows.

    Args:
        rows: those of the table, in its order.
    """
    return [
        {
            "expectation": result.name,
            "description": result.description,
            "severity": result.severity,
            "problem": result.problem,
            "unexpected_count": result.unexpected_count,
            "observed_value": result.observed_value,
            "rows": [
                _show_row(rows[position], table, position, result.column)
                for position in result.positions[:limit]
            ],
        }
        for result in results
        if not result.success
    ]


def _show_row(row: Row, table: pd.DataFrame, position: int, column: str | None) -> dict[str, Any]:
    shown = {"id": row.id, "question": row.question, "answer": row.answer}
    if column and column not in shown:
        shown[column] = to_plain(table[column].iloc[position])
    return shown


def render_page(result: Any, failures: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """Render Great Expectations' sections in a page that works without a network.

    Its own page loads styles, icons and tables from five CDNs, and is plain text without a network; it also
    contains the time of the run, so that two runs differ.
    """
    from great_expectations.render.renderer import ValidationResultsPageRenderer
    from great_expectations.render.view import DefaultJinjaSectionView
    from jinja2 import Environment, StrictUndefined

    for one in result.results:
        for bulky in ("unexpected_list", "unexpected_index_list", "unexpected_index_query"):
            (one.result or {}).pop(bulky, None)  # in failures.json; here they would be thousands of cells
        # GX 1.24.1 does not escape values of the data in table cells: a row could contain HTML.
        one.result = _escaped(to_plain(one.result or {}))
        one.exception_info = {
            "raised_exception": False,
            "exception_message": None,
            "exception_traceback": None,
        }
    result.meta["run_id"] = {"run_name": facts["data_sha256"], "run_time": "1970-01-01T00:00:00+00:00"}
    # The first section repeats our header; the last one has the times of the run.
    sections = ValidationResultsPageRenderer(run_info_at_end=True).render(result).sections[1:-1]
    view = DefaultJinjaSectionView()
    body = "".join(
        view.render({"section": section.to_json_dict(), "section_loop": {"index": index}})
        for index, section in enumerate(sections, start=1)
    )
    # A chart's script would need vega from a CDN.
    body = re.sub(r"<script\b.*?</script>", "", body, flags=re.S)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(tokens=read_tokens(), sections=body, failures=failures, **facts)
    lines = (line.rstrip() for line in page.splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return html.escape(value)
    if isinstance(value, list | tuple):
        return [_escaped(item) for item in value]
    return {key: _escaped(item) for key, item in value.items()} if isinstance(value, dict) else value


def format_failures(failures: Sequence[Mapping[str, Any]], total: int, shown: int) -> str:
    """Return which expectations failed, with at most `shown` unexpected rows of each."""
    lines = [f"{len(failures)} critical expectation{'s' * (len(failures) > 1)} failed on {total} rows"]
    for failure in failures:
        lines.append(f"- {describe_failure(failure)}")
        lines += [f"    {_row_line(row)}" for row in failure["rows"][:shown]]
        hidden = (failure["unexpected_count"] or 0) - len(failure["rows"][:shown])
        if hidden > 0 and failure["rows"]:
            lines.append(f"    … and {hidden} more")
    return "\n".join(lines)


def describe_failure(failure: Mapping[str, Any]) -> str:
    """Return one line about a failed expectation."""
    what = f"{failure['expectation']} {failure['description']}".strip()
    if failure["problem"]:
        return f"{what}: could not be computed: {failure['problem']}"
    if failure["unexpected_count"] is not None:
        count = failure["unexpected_count"]
        return f"{what}: {count} row{'s violate' if count > 1 else ' violates'} it"
    return f"{what}: observed {failure['observed_value']}"


def _row_line(row: Mapping[str, Any]) -> str:
    parts = [f"{key}: {_short(value)}" for key, value in row.items() if key != "id"]
    return f"{row['id']}  {'  '.join(parts)}"


def _short(value: Any, limit: int = 80) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else format_canonical_json(value)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
