"""The Great Expectations suite: build it, run it over the rows, read its results."""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.common.chat.row_class import read_row_class
from stages.common.chat.turns import list_learned
from stages.common.errors import ParamsError
from stages.common.messages import LearnedTurns
from stages.common.params.checked_yaml import suggest_nearest
from stages.common.records import ORIGINS, Row
from stages.common.task.protocol import Task

if TYPE_CHECKING:
    import pandas as pd

FIELDS: Mapping[str, Callable[[Row], Any]] = {
    "id": lambda row: row.id,
    "source": lambda row: row.source,
    "license": lambda row: row.license.lower(),  # SPDX ids do not depend on case
    "group": lambda row: row.group,
    "origin": lambda row: row.origin,
    "language": lambda row: row.tags.get("language"),
    "system_prompt": lambda row: m.content if (m := row.messages[0]).role == "system" else None,
    "question": lambda row: row.question,
    "answer": lambda row: row.answer,
    "prompt_chars": lambda row: sum(map(len, list_prompt_texts(row))),
    "answer_chars": lambda row: len(row.answer),
    "turns": lambda row: len(row.messages),
    "tools": lambda row: len(row.tools),
    "calls": lambda row: sum(len(message.tool_calls) for message in row.messages),
    "question_has_text": lambda row: bool(row.question.strip()),
    "answer_has_text": lambda row: bool(row.answer.strip()),
}
TEXTS = ("system_prompt", "question", "answer")  # columns whose values may be long
# An expectation as in params.yaml: its type, its severity, and its own arguments.
Spec = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ExpectationResult:
    """The result of one expectation.

    Attributes:
        unexpected_count: rows that violate it; None for an expectation about the whole table or column.
        observed_value: what was measured, for those.
        positions: of the unexpected rows in the table, in order.
        problem: why it could not be computed, which counts as failed.
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
        """The expectation with its column."""
        return f"{self.type}({self.column})" if self.column else self.type


def list_prompt_texts(row: Row) -> list[str]:
    """Return what the model reads before the last answer: the tools, and all messages."""
    return [*(tool.text for tool in row.tools), *(message.answer for message in row.prompt)]


def find_read_texts(specs: Iterable[Spec]) -> set[str]:
    """Return the columns of texts that expectations of the user name, or that tables' columns are about."""
    specs = list(specs)
    if any("TableColumn" in str(spec.get("type")) for spec in specs):
        return set(TEXTS)
    named = " ".join(str(value) for spec in specs for value in spec.values())
    return {name for name in TEXTS if re.search(rf"\b{name}\b", named)}


def build_table(
    rows: Sequence[Row], task: Task, texts: Collection[str] = TEXTS, learned_turns: LearnedTurns = "last"
) -> pd.DataFrame:
    """Return one table row for each row: its fields, its lengths in characters, its tags as `tag_<key>`.

    `answer_is_valid` holds if all learned answers of a row are of the task, and `answer_chars` is the length
    of the longest; the other columns of answers are about the last. Where answers have classes, `label` is a
    row's class (None where it has none) and `label_share` the rows with the same class over all rows.

    Args:
        texts: the columns of `TEXTS` that the table gets; others take no memory.
        learned_turns: which answers of a row are learned.
    """
    import pandas as pd

    excluded = set(TEXTS) - set(texts)
    read = {name: read_field for name, read_field in FIELDS.items() if name not in excluded}

    def list_answers(row: Row) -> list[str]:
        return [row.messages[place].answer for place in list_learned(row.messages, learned_turns)]

    read["answer_chars"] = lambda row: max(map(len, list_answers(row)), default=0)
    read["answer_is_valid"] = lambda row: all(task.find_problem(one) is None for one in list_answers(row))
    if task.class_name is not None:
        read["label"] = lambda row: read_row_class(row, task)
    table: dict[str, Any] = {name: [] for name in read}
    tags = []
    for row in rows:  # once: they may be in a file
        for name, read_field in read.items():
            table[name].append(read_field(row))
        tags.append(row.tags)
    if task.class_name is not None:
        counts = Counter(table["label"])
        table["label_share"] = [counts[label] / len(rows) for label in table["label"]]
    for key in sorted({key for row_tags in tags for key in row_tags}):
        table[f"tag_{key}"] = [row_tags.get(key) for row_tags in tags]
    for name in read.keys() & TEXTS:
        # As Python's own strings, which are in memory already; Great Expectations copies pandas' own.
        table[name] = pd.Series(table[name], dtype=object)
    return pd.DataFrame(table)


def list_expectations(
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
    """Return the expectations for every set of rows.

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
            # By columns of their own: the texts of 100,000 passages would be in memory several times.
            *(
                {"type": "ExpectColumnValuesToBeInSet", "column": f"{c}_has_text", "value_set": [True]}
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
        ParamsError: with every expectation whose type, argument or column is unknown, and the nearest known
            one. Great Expectations itself would silently pass some of them.
    """
    import great_expectations as gx

    columns = list(columns)
    expectations, problems = [], []
    for spec in specs:
        kind = getattr(gx.expectations, str(spec.get("type")), None)
        if kind is None:
            known = [name for name in dir(gx.expectations) if name.startswith("Expect")]
            problems.append(
                f"{spec.get('type')!r} is not an expectation{suggest_nearest(str(spec.get('type')), known)}"
            )
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
            lines, "correct the expectation in params.yaml; its arguments are those of Great Expectations"
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
                yield f"there is no column {column!r}{suggest_nearest(str(column), columns)}"


def _as_list(value: Any) -> Any:
    """Return tuples, which the frozen parameters have, as lists."""
    if isinstance(value, list | tuple):
        return [_as_list(item) for item in value]
    return {key: _as_list(item) for key, item in value.items()} if isinstance(value, dict) else value


def run_suite(suite: Any, table: pd.DataFrame) -> Any:
    """Validate the table; return Great Expectations' result with the positions of all unexpected rows."""
    import great_expectations as gx

    # It logs a temporary folder as a warning.
    logging.getLogger("great_expectations.data_context.types.base").setLevel(logging.ERROR)
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    source = context.data_sources.add_pandas("perennial")
    batch = source.add_dataframe_asset("curated rows").add_batch_definition_whole_dataframe("all")
    with hash_no_table():
        return batch.get_batch({"dataframe": table}).validate(
            suite, result_format={"result_format": "COMPLETE"}
        )


@contextmanager
def hash_no_table() -> Iterator[None]:
    """Keep Great Expectations from hashing the table for a record that is thrown away.

    A hash takes several copies of all texts. No setting turns it off; it is left out for tables above a size
    that is a constant of the module, which is 0 in the block.
    """
    from great_expectations.execution_engine import pandas_execution_engine

    before = pandas_execution_engine.HASH_THRESHOLD
    pandas_execution_engine.HASH_THRESHOLD = 0
    try:
        yield
    finally:
        pandas_execution_engine.HASH_THRESHOLD = before


def read_results(result: Any) -> list[ExpectationResult]:
    """Return the result of each expectation, in the order of the suite."""
    return [_read_result(one) for one in result.results]


def _read_result(one: Any) -> ExpectationResult:
    config, measured = one.expectation_config, one.result or {}
    kwargs = {key: value for key, value in config.kwargs.items() if key not in ("batch_id", "column")}
    positions = measured.get("unexpected_index_list") or []
    return ExpectationResult(
        type="".join(word.capitalize() for word in config.type.split("_")),
        column=config.kwargs.get("column"),
        severity=str(getattr(config.severity, "value", config.severity)),
        description=", ".join(f"{key}={to_plain(value)}" for key, value in sorted(kwargs.items())),
        success=bool(one.success),
        unexpected_count=measured.get("unexpected_count"),
        observed_value=to_plain(measured.get("observed_value")),
        positions=tuple(int(position) for position in positions),
        problem="; ".join(sorted(set(_exceptions(one.exception_info)))) or None,
    )


def _exceptions(info: Any) -> Iterable[str]:
    """Yield the messages in an exception_info, which is one record or one for each metric."""
    for record in [info] if "raised_exception" in (info or {}) else (info or {}).values():
        if record.get("raised_exception"):
            yield str(record.get("exception_message")).splitlines()[0]


def to_plain(value: Any) -> Any:
    """Return a value as JSON can hold it, the same in every run."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, set | frozenset):
        return sorted((to_plain(item) for item in value), key=str)
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if value is None or isinstance(value, str | bool | int):
        return value
    return to_plain(value.item()) if hasattr(value, "item") else str(value)
