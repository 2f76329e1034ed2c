"""Validate: check the curated rows against a Great Expectations suite; a critical failure stops the pipeline.

In: `artifacts/curate/rows.parquet` and `task.json`.
Out: `reports/validate/metrics.json` (each expectation with its result), `failures.json` (unexpected rows) and
`data_docs/index.html`, a page that opens without a network; written before the stage fails.
Run: `python -m stages.validate`
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from stages.common.artifacts import (
    artifacts,
    atomic_dir,
    hash_file,
    missing,
    reports,
    write_json,
    write_text,
)
from stages.common.errors import InputError
from stages.common.logs import get_logger, run_stage, set_quiet_environment
from stages.common.params.loading import load_params
from stages.common.records import read_rows
from stages.common.statistics.row_counts import describe_rejects
from stages.common.statistics.sizes import choose_min_rows
from stages.common.task.kinds import read_task
from stages.validate.page import describe_failure, format_failures, list_failures, render_page
from stages.validate.suite import (
    TEXTS,
    build_suite,
    build_table,
    find_read_texts,
    list_expectations,
    read_results,
    run_suite,
)

if TYPE_CHECKING:
    import pandas as pd

logger = get_logger("validate")


MAX_RECORDED_ROWS = 200  # per expectation in failures.json: enough to see a pattern, small enough to open


def find_largest_label(table: pd.DataFrame) -> dict[str, Any] | None:
    """Return the number of labels, and the most common one with its share; None without labels."""
    if "label" not in table or not table["label"].notna().any():
        return None
    counts = table["label"].value_counts()
    name = sorted(counts[counts == counts.max()].index)[0]
    return {"count": len(counts), "largest": name, "largest_share": float(counts.max()) / len(table)}


def describe_critical(
    critical: Sequence[Mapping[str, Any]], rows: int, min_rows: int, max_shown_rows: int
) -> InputError:
    """Return the error about critical failures; where rows are too few, with where the others went."""
    what, fixes = format_failures(critical, rows, max_shown_rows), []
    if rows < min_rows:
        what = "\n".join([what, *describe_rejects()])
        fixes.append(
            "read the rejected rows and correct them or the rule that rejects them (curate), collect more, "
            "or lower validate.min_rows"
        )
    if any(failure["rows"] for failure in critical) or not fixes:
        folder = reports("validate")
        fixes.append(
            f"correct these rows in their source ({folder / 'failures.json'} lists them, "
            f"{folder / 'data_docs' / 'index.html'} shows all results), or change the expectation or its "
            "severity under validate in params.yaml"
        )
    return InputError(what, "; ".join(fixes))


def main() -> None:
    """Validate the curated rows, write the reports, then fail if a critical expectation did."""
    everything = load_params()
    params, split = everything.validate_, everything.split
    set_quiet_environment()
    path = artifacts("curate") / "rows.parquet"
    if not path.exists():
        raise missing(path)
    rows = read_rows(path)
    task = read_task()
    table = build_table(rows, task, find_read_texts(params.expectations), everything.task.turns)
    classes = table["label"].nunique() if task.class_name else 0
    min_rows = choose_min_rows(params.min_rows, split.test_fraction, split.validation_fraction, classes)
    own = list_expectations(
        min_rows=min_rows,
        max_rows=params.max_rows,
        allowed_licenses=params.allowed_licenses,
        max_prompt_chars=params.max_prompt_chars,
        max_answer_chars=params.max_answer_chars,
        has_classes=task.class_name is not None,
        min_labels=params.min_labels,
        max_labels=params.max_labels,
        max_label_share=params.max_label_share,
        severity=params.severity.model_dump(),
    )
    report = run_suite(build_suite([*own, *params.expectations], [*table.columns, *TEXTS]), table)
    results = read_results(report)
    failures = list_failures(results, table, rows, MAX_RECORDED_ROWS)
    critical = [failure for failure in failures if failure["severity"] == "critical"]
    facts = {
        "critical_failures": len(critical),
        "data_sha256": hash_file(path),
        "expectations_met": sum(result.success for result in results),
        "expectations_total": len(results),
        "rows": len(rows),
        "success": not critical,
        "warnings": len(failures) - len(critical),
    }
    # The positions of unexpected rows are in failures.json.
    evidence = [{k: v for k, v in asdict(result).items() if k != "positions"} for result in results]
    folder = reports("validate")
    write_json(
        folder / "metrics.json", {**facts, "labels": find_largest_label(table), "expectations": evidence}
    )
    write_json(folder / "failures.json", {"rows_recorded_at_most": MAX_RECORDED_ROWS, "failures": failures})
    with atomic_dir(folder / "data_docs") as docs:
        write_text(docs / "index.html", render_page(report, failures, facts))
    for failure in failures:
        level = logging.ERROR if failure["severity"] == "critical" else logging.WARNING
        logger.log(level, "%s: %s", failure["severity"], describe_failure(failure))
    logger.info("%d of %d expectations met by %d rows", facts["expectations_met"], len(results), len(rows))
    if critical:
        raise describe_critical(critical, len(rows), min_rows, params.max_shown_rows)


if __name__ == "__main__":
    run_stage(main)
