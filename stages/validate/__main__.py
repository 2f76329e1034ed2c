"""Hold the curated rows to a Great Expectations suite; a failing critical expectation stops the pipeline.

Enters: artifacts/curate/rows.parquet, the section `validate` of params.yaml.
Leaves: reports/validate/metrics.json (every expectation with its outcome), failures.json (offending rows) and
data_docs/index.html, a page that opens without a network. They are written before the stage fails.
Run: python -m stages.validate
"""

from __future__ import annotations

import difflib
import hashlib
import html
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.common.artifacts import artifacts, atomic_dir, missing, reports, write_json, write_text
from stages.common.errors import InputError, ParamsError
from stages.common.logs import get_logger, run_stage, set_quiet_environment
from stages.common.params.checked_yaml import nearest
from stages.common.params.loading import load_params
from stages.common.records import ORIGINS, Row, canonical_json, read_rows
from stages.common.sizes import choose_min_rows
from stages.common.task.kinds import read_task
from stages.common.task.protocol import Task

if TYPE_CHECKING:
    import pandas as pd

logger = get_logger("validate")

# An expectation as params.yaml writes it: its type, its severity, and its own arguments.
Spec = Mapping[str, Any]

MAX_RECORDED_ROWS = 200  # of one expectation, in failures.json: enough to see a pattern, small enough to open
TEMPLATE = Path(__file__).with_name("page.html.j2")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one expectation.

    Attributes:
        unexpected_count: rows that broke it; None for an expectation about the whole table or column.
        observed_value: what was measured instead, for those.
        positions: of the offending rows in the table, in order.
        problem: why it could not be computed at all; it counts as failed.
    """

    type: str
    column: str | None
    severity: str
    description: str
    success: bool
    unexpected_count: int | None
    observed_value: Any
    positions: tuple[int, ...]
    problem: str | None

    @property
    def name(self) -> str:
        """The expectation as people speak of it."""
        return f"{self.type}({self.column})" if self.column else self.type


def table_of(rows: Sequence[Row], task: Task) -> pd.DataFrame:
    """Return one table row for each row: its fields, its lengths in characters, its tags as `tag_<key>`.

    `answer_is_valid` holds for answers of the task. Where these have classes, `label` is an answer's class
    (None where it has none) and `label_share` the rows with the same class over all rows.
    """
    import pandas as pd

    table: dict[str, list[Any]] = {
        "id": [row.id for row in rows],
        "source": [row.source for row in rows],
        "license": [row.license.lower() for row in rows],  # SPDX ids do not depend on case
        "group": [row.group for row in rows],
        "origin": [row.origin for row in rows],
        "language": [row.tags.get("language") for row in rows],
        "system_prompt": [m.content if (m := row.messages[0]).role == "system" else None for row in rows],
        "question": [row.question for row in rows],
        "answer": [row.answer for row in rows],
        "prompt_chars": [sum(len(message.content) for message in row.prompt) for row in rows],
        "answer_chars": [len(row.answer) for row in rows],
        "turns": [len(row.messages) for row in rows],
    }
    table["answer_is_valid"] = [task.find_problem(row.answer) is None for row in rows]
    if task.class_name is not None:
        labels = [task.read_class(row.answer) for row in rows]
        counts = Counter(labels)
        table["label"] = labels
        table["label_share"] = [counts[label] / len(rows) for label in labels]
    for key in sorted({key for row in rows for key in row.tags}):
        table[f"tag_{key}"] = [row.tags.get(key) for row in rows]
    return pd.DataFrame(table)


def own_expectations(
    *,
    min_rows: int,
    max_rows: int,
    allowed_licenses: Sequence[str],
    max_prompt_chars: int,
    max_answer_chars: int,
    has_classes: bool,
    min_labels: int,
    max_labels: int | None,
    max_label_share: float,
    severity: Mapping[str, str],
) -> list[Spec]:
    """Return the expectations that every set of rows is held to.

    Args:
        severity: of each subject (rows, ids, provenance, licenses, texts, answers, labels).
    """
    licenses = sorted({license.lower() for license in allowed_licenses})
    subjects: dict[str, list[dict[str, Any]]] = {
        "rows": [{"type": "ExpectTableRowCountToBeBetween", "min_value": min_rows, "max_value": max_rows}],
        "ids": [
            {"type": "ExpectColumnValuesToNotBeNull", "column": "id"},
            {"type": "ExpectColumnValuesToBeUnique", "column": "id"},
        ],
        "provenance": [
            *({"type": "ExpectColumnValuesToNotBeNull", "column": c} for c in ("source", "group")),
            *(
                {"type": "ExpectColumnValuesToMatchRegex", "column": c, "regex": r"\S"}
                for c in ("source", "group")
            ),
            {"type": "ExpectColumnValuesToBeInSet", "column": "origin", "value_set": list(ORIGINS)},
        ],
        "licenses": [{"type": "ExpectColumnValuesToBeInSet", "column": "license", "value_set": licenses}],
        "texts": [
            *(
                {"type": "ExpectColumnValuesToMatchRegex", "column": c, "regex": r"\S"}
                for c in ("question", "answer")
            ),
            _between("prompt_chars", 1, max_prompt_chars),
            _between("answer_chars", 1, max_answer_chars),
        ],
    }
    subjects["answers"] = [
        {"type": "ExpectColumnValuesToBeInSet", "column": "answer_is_valid", "value_set": [True]}
    ]
    if has_classes:
        subjects["answers"].append({"type": "ExpectColumnValuesToNotBeNull", "column": "label"})
        labels = {"min_value": min_labels, "max_value": max_labels}
        subjects["labels"] = [
            {"type": "ExpectColumnUniqueValueCountToBeBetween", "column": "label", **labels},
            _between("label_share", 0.0, max_label_share),
        ]
    return [{"severity": severity[subject], **spec} for subject, specs in subjects.items() for spec in specs]


def _between(column: str, low: float, high: float) -> dict[str, Any]:
    return {"type": "ExpectColumnValuesToBeBetween", "column": column, "min_value": low, "max_value": high}


def build_suite(specs: Sequence[Spec], columns: Iterable[str]) -> Any:
    """Build the Great Expectations suite.

    Raises:
        ParamsError: with every expectation whose type, argument or column nobody knows, and the nearest
            that somebody does. Left to Great Expectations, an unknown one could pass in silence.
    """
    import great_expectations as gx

    columns = list(columns)
    expectations, problems = [], []
    for spec in specs:
        kind = getattr(gx.expectations, str(spec.get("type")), None)
        if kind is None:
            known = [name for name in dir(gx.expectations) if name.startswith("Expect")]
            problems.append(f"{spec.get('type')!r} is no expectation{nearest(str(spec.get('type')), known)}")
            continue
        arguments = {key: _as_list(value) for key, value in spec.items() if key != "type"}
        found = list(_argument_problems(kind, arguments, columns))
        if not found:
            try:
                expectations.append(kind(**arguments))
            except ValueError as error:  # a pydantic error, of whichever pydantic GX is built on
                found.append("; ".join(line.strip() for line in str(error).splitlines()[1:]))
        problems += [f"{spec['type']}: {problem}" for problem in found]
    if problems:
        lines = "\n".join(f"validate.expectations: {problem}" for problem in problems)
        raise ParamsError(
            lines, "mend the expectation in params.yaml; its arguments are Great Expectations' own"
        )
    return gx.ExpectationSuite(name="curated rows", expectations=expectations)


def _argument_problems(kind: Any, arguments: Mapping[str, Any], columns: Sequence[str]) -> Iterable[str]:
    known = list(kind.__fields__)
    for key in arguments:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            yield f"unknown argument {key!r}" + (f"; did you mean {close[0]}?" if close else "")
    for key in ("column", "column_A", "column_B", "column_list", "column_set"):
        named = arguments.get(key)
        for column in [named] if isinstance(named, str) else named or []:
            if column not in columns and kind.__name__ != "ExpectColumnToExist":
                yield f"there is no column {column!r}{nearest(str(column), columns)}"


def _as_list(value: Any) -> Any:
    """Lists where params.yaml, frozen, has tuples."""
    if isinstance(value, list | tuple):
        return [_as_list(item) for item in value]
    return {key: _as_list(item) for key, item in value.items()} if isinstance(value, dict) else value


def run_suite(suite: Any, table: pd.DataFrame) -> Any:
    """Validate the table; return Great Expectations' result with the positions of all unexpected rows."""
    import great_expectations as gx

    # It logs a folder that it then removes, at a level of its own.
    logging.getLogger("great_expectations.data_context.types.base").setLevel(logging.ERROR)
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    source = context.data_sources.add_pandas("perennial")
    batch = source.add_dataframe_asset("curated rows").add_batch_definition_whole_dataframe("all")
    return batch.get_batch({"dataframe": table}).validate(suite, result_format={"result_format": "COMPLETE"})


def outcomes_of(result: Any) -> list[Outcome]:
    """Read the outcome of each expectation, in the suite's order."""
    return [_outcome(one) for one in result.results]


def _outcome(one: Any) -> Outcome:
    config, measured = one.expectation_config, one.result or {}
    kwargs = {key: value for key, value in config.kwargs.items() if key not in ("batch_id", "column")}
    positions = measured.get("unexpected_index_list") or []
    return Outcome(
        type="".join(word.capitalize() for word in config.type.split("_")),
        column=config.kwargs.get("column"),
        severity=str(getattr(config.severity, "value", config.severity)),
        description=", ".join(f"{key}={_plain(value)}" for key, value in sorted(kwargs.items())),
        success=bool(one.success),
        unexpected_count=measured.get("unexpected_count"),
        observed_value=_plain(measured.get("observed_value")),
        positions=tuple(int(position) for position in positions),
        problem="; ".join(sorted(set(_exceptions(one.exception_info)))) or None,
    )


def _exceptions(info: Any) -> Iterable[str]:
    """Yield the messages in an exception_info, which is one record or one for each metric."""
    for record in [info] if "raised_exception" in (info or {}) else (info or {}).values():
        if record.get("raised_exception"):
            yield str(record.get("exception_message")).splitlines()[0]


def _plain(value: Any) -> Any:
    """Return a value that JSON knows, the same in each run."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=str)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, str | bool | int):
        return value
    return _plain(value.item()) if hasattr(value, "item") else str(value)


def failures_of(outcomes: Sequence[Outcome], table: pd.DataFrame, limit: int) -> list[dict[str, Any]]:
    """Return each failed expectation with at most `limit` of its offending rows."""
    return [
        {
            "expectation": outcome.name,
            "description": outcome.description,
            "severity": outcome.severity,
            "problem": outcome.problem,
            "unexpected_count": outcome.unexpected_count,
            "observed_value": outcome.observed_value,
            "rows": [_shown_row(table, position, outcome.column) for position in outcome.positions[:limit]],
        }
        for outcome in outcomes
        if not outcome.success
    ]


def _shown_row(table: pd.DataFrame, position: int, column: str | None) -> dict[str, Any]:
    columns = ["id", "question", "answer"]
    if column and column not in columns:
        columns.append(column)
    values = table.iloc[position]
    return {name: _plain(None if values[name] is None else values[name]) for name in columns}


def data_docs_page(result: Any, failures: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """Render Great Expectations' own sections in a page that needs nothing from outside.

    GX's own page loads its styles, icons and tables from five CDNs, and shows bare text without a network;
    it also stamps the time of the run, so that two runs differ. Its sections have neither.
    """
    from great_expectations.render.renderer import ValidationResultsPageRenderer
    from great_expectations.render.view import DefaultJinjaSectionView
    from jinja2 import Environment, StrictUndefined

    for one in result.results:
        for bulky in ("unexpected_list", "unexpected_index_list", "unexpected_index_query"):
            (one.result or {}).pop(
                bulky, None
            )  # they are in failures.json; here they would be thousands of cells
        # GX 1.24.1 puts values of the data into table cells as they are: a row could bring its own HTML.
        one.result = _escaped(_plain(one.result or {}))
        one.exception_info = {
            "raised_exception": False,
            "exception_message": None,
            "exception_traceback": None,
        }
    result.meta["run_id"] = {"run_name": facts["data_sha256"], "run_time": "1970-01-01T00:00:00+00:00"}
    # The first section repeats our head, the last one holds the times of the run.
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
    lines = (
        line.rstrip() for line in template.render(sections=body, failures=failures, **facts).splitlines()
    )
    return "\n".join(line for line in lines if line) + "\n"


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return html.escape(value)
    if isinstance(value, list | tuple):
        return [_escaped(item) for item in value]
    return {key: _escaped(item) for key, item in value.items()} if isinstance(value, dict) else value


def failure_message(failures: Sequence[Mapping[str, Any]], total: int, shown: int) -> str:
    """Say which expectations failed, with at most `shown` offending rows of each."""
    lines = [f"{len(failures)} critical expectation{'s' * (len(failures) > 1)} failed on {total} rows"]
    for failure in failures:
        lines.append(f"- {_failure_line(failure)}")
        lines += [f"    {_row_line(row)}" for row in failure["rows"][:shown]]
        hidden = (failure["unexpected_count"] or 0) - len(failure["rows"][:shown])
        if hidden > 0 and failure["rows"]:
            lines.append(f"    … and {hidden} more")
    return "\n".join(lines)


def _failure_line(failure: Mapping[str, Any]) -> str:
    what = f"{failure['expectation']} {failure['description']}".strip()
    if failure["problem"]:
        return f"{what}: could not be computed: {failure['problem']}"
    if failure["unexpected_count"] is not None:
        count = failure["unexpected_count"]
        return f"{what}: {count} row{'s break' if count > 1 else ' breaks'} it"
    return f"{what}: observed {failure['observed_value']}"


def _row_line(row: Mapping[str, Any]) -> str:
    parts = [f"{key}: {_short(value)}" for key, value in row.items() if key != "id"]
    return f"{row['id']}  {'  '.join(parts)}"


def _short(value: Any, limit: int = 80) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else canonical_json(value)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def largest_label(table: pd.DataFrame) -> dict[str, Any] | None:
    """Return how many labels there are, and the most common one with its share; None for a task without."""
    if "label" not in table or not table["label"].notna().any():
        return None
    counts = table["label"].value_counts()
    name = sorted(counts[counts == counts.max()].index)[0]
    return {"count": len(counts), "largest": name, "largest_share": float(counts.max()) / len(table)}


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
    table = table_of(rows, task)
    classes = table["label"].nunique() if task.class_name else 0
    own = own_expectations(
        min_rows=choose_min_rows(params.min_rows, split.test_fraction, split.validation_fraction, classes),
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
    result = run_suite(build_suite([*own, *params.expectations], table.columns), table)
    outcomes = outcomes_of(result)
    failures = failures_of(outcomes, table, MAX_RECORDED_ROWS)
    critical = [failure for failure in failures if failure["severity"] == "critical"]
    facts = {
        "critical_failures": len(critical),
        "data_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "expectations_met": sum(outcome.success for outcome in outcomes),
        "expectations_total": len(outcomes),
        "rows": len(rows),
        "success": not critical,
        "warnings": len(failures) - len(critical),
    }
    evidence = [
        {
            "type": outcome.type,
            "column": outcome.column,
            "description": outcome.description,
            "severity": outcome.severity,
            "success": outcome.success,
            "unexpected_count": outcome.unexpected_count,
            "observed_value": outcome.observed_value,
            "problem": outcome.problem,
        }
        for outcome in outcomes
    ]
    folder = reports("validate")
    write_json(folder / "metrics.json", {**facts, "labels": largest_label(table), "expectations": evidence})
    write_json(folder / "failures.json", {"rows_recorded_at_most": MAX_RECORDED_ROWS, "failures": failures})
    with atomic_dir(folder / "data_docs") as docs:
        write_text(docs / "index.html", data_docs_page(result, failures, facts))
    for failure in failures:
        level = logging.ERROR if failure["severity"] == "critical" else logging.WARNING
        logger.log(level, "%s: %s", failure["severity"], _failure_line(failure))
    logger.info("%d of %d expectations met by %d rows", facts["expectations_met"], len(outcomes), len(rows))
    if critical:
        raise InputError(
            failure_message(critical, len(rows), params.max_shown_rows),
            f"mend these rows in their source ({folder / 'failures.json'} lists them, "
            f"{folder / 'data_docs' / 'index.html'} shows everything), or change the expectation or its "
            "severity under validate in params.yaml",
        )


if __name__ == "__main__":
    run_stage(main)
