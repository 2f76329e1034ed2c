"""What `init` prints: what was found, what changes in `params.yaml`, and what `make run` will do."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flows.init.estimate import RunEstimate
from flows.init.proposal import Findings
from flows.init.reading import DataFile
from stages.common.records import Row, separate_refused
from stages.common.sources.detection.survey import Spread, Survey
from stages.common.sources.detection.tool_use import ToolUse
from stages.common.sources.files.entries import count, shorten, shorten_text

SHOWN_CLASSES = 5
SHOWN_REJECTED = 3
SHOWN_LANGUAGES = 5
LEAST_SHARE = 0.01  # of the rows; a language with less is likely a wrong guess
SHOWN_CHARS = 70
BUSY_SHARE = 0.75  # of the cores; more are not busy with this command alone
LONG_MINUTES, SHORT_MINUTES = 60, 30  # above the first, what runs in the second is shown too
LEAST_TEST_ROWS = 100  # with fewer, an interval of 95 % is wider than ten points each way


def report_findings(found: Findings, is_exact: bool) -> str:
    """Return the report on the data."""
    lines = [line for file in found.files for line in _report_file(file)]
    lines += _report_task(found)
    lines += _report_survey(found.survey, is_exact)
    return "\n".join(lines) + "\n"


def _report_file(file: DataFile) -> Iterator[str]:
    metrics, rejected = file.collected.metrics, file.collected.rejected
    details = [metrics["format"], metrics["encoding"] or ""]
    if file.is_guessed:
        details[1] += " (guessed: check the example below)"
    if metrics["delimiter"]:
        details.append(f"delimiter {metrics['delimiter']!r}")
    if above := metrics["lines_above_header"]:
        details.append(f"{count(above, 'line')} above the header skipped")
    yield f"{file.origin}: {count(len(file.collected.rows), 'row')} ({', '.join(filter(None, details))})"
    columns = ", ".join(f"{part} = {name}" for part, name in metrics["columns"].items())
    yield f"  shape        {metrics['shape']}: {columns}"
    if metrics["forms"]:
        forms = ", ".join(f"{form} ({count(rows, 'row')})" for form, rows in metrics["forms"].items())
        yield f"  forms        {forms}"
    if metrics["unread_columns"]:
        names = ", ".join(metrics["unread_columns"])
        yield f"  not read     {names} (--tag-columns, --group-column or --context-column read a column)"
    if file.columns.group:
        yield f"  groups       rows with the same {file.columns.group} stay on one side of the split"
    if preferences := _describe_preferences(file.collected.rows):
        yield f"  preferences  {preferences} (docs/how-to/methods.md: finetune.method dpo, orpo, kto)"
    row = separate_refused(file.collected.rows)[0][0]
    yield f"  example      {shorten(row.question)} -> {shorten(row.answer)}"
    if rejected:
        by_reason = Counter(reject.reason for reject in rejected).most_common()
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in by_reason)
        yield f"  rejected     {count(len(rejected), 'row')}: {reasons}"
        for reject in rejected[:SHOWN_REJECTED]:
            yield f"               line {reject.line}: {reject.reason}: {reject.detail}"


def _describe_preferences(rows: Sequence[Row]) -> str:
    """Return how many rows have two answers, and how many are rated; empty where none is."""
    pairs = good = bad = 0
    for row in rows:
        pairs += row.rejected is not None
        good += row.is_desirable is True
        bad += row.is_desirable is False
    parts = [f"{pairs:,} with a worse answer"] * bool(pairs)
    return ", ".join([*parts, *[f"{good:,} good and {bad:,} bad answers"] * bool(good or bad)])


def _report_task(found: Findings) -> Iterator[str]:
    key = f", the class is under {found.task.label_key!r}" if found.task.label_key else ""
    yield f"task           {found.task.kind}{key}: {found.task.reason}"
    classes = found.survey.classes
    if classes:
        total = sum(classes.values())
        shown = [
            f"{shorten(name, 30)} {rows / total:.0%}" for name, rows in list(classes.items())[:SHOWN_CLASSES]
        ]
        name, rows = list(classes.items())[-1]
        smallest = f"smallest {shorten(name, 30)} ({count(rows, 'row')})"
        yield f"  classes      {len(classes):,}: {', '.join(shown)}; {smallest}"
    if found.tool_use is not None:
        yield from _report_tool_use(found.tool_use)
    if found.languages is None:
        yield "  languages    not detected: pip install '.[monitor]', or give --language"
    elif found.languages:
        total = sum(found.languages.values())
        shares = [(code, rows / total) for code, rows in found.languages.items()]
        shown = [f"{code} {share:.0%}" for code, share in shares[:SHOWN_LANGUAGES] if share >= LEAST_SHARE]
        yield f"  languages    {', '.join(shown)}"


def _report_tool_use(use: ToolUse) -> Iterator[str]:
    if use.tools or use.calls:
        yield f"  tools        {use.tools:,}, at most {use.most_tools:,} in a row"
        yield (
            f"  calls        in {use.calling_share:.0%} of {use.answers:,} answers, "
            f"{use.calls / max(1, use.calling_answers):.1f} in one (mean), {use.most_calls:,} (most)"
        )
    yield (
        f"  turns        {use.questions / use.conversations:.1f} questions in a conversation (mean), "
        f"{use.most_questions:,} (most)"
    )


def _report_survey(survey: Survey, is_exact: bool) -> Iterator[str]:
    yield f"  question     {_report_spread(survey.question_chars)} characters"
    yield f"  answer       {_report_spread(survey.answer_chars)} characters"
    if survey.duplicates:
        yield f"  duplicates   {count(survey.duplicates, 'row')}: curate drops them"
    if survey.conflicts:
        yield f"  conflicts    {count(survey.conflicts, 'row')} with a prompt that has several answers"
    if survey.sampled < survey.rows:
        yield (
            f"  sample       tokens, personal data and odd texts are from {survey.sampled:,} of "
            f"{survey.rows:,} rows drawn at random; classes, characters, duplicates and conflicts from all"
        )
    about = "" if is_exact and survey.sampled == survey.rows else "about "
    yield f"  tokens       {about}{survey.total_tokens:,}; a row has {_report_spread(survey.row_tokens)}"
    if survey.long_rows:
        long = count(survey.long_rows, "row")
        yield f"  too long     {about}{long} of more tokens than finetune.max_length: not trained on"
    if survey.personal_data:
        kinds = ", ".join(f"{kind} in {count(rows, 'row')}" for kind, rows in survey.personal_data.items())
        yield f"  personal     {kinds}: curate drops them (curate.personal_data)"
    for oddity in survey.oddities:
        yield f"  suspicious   {oddity.what}: {count(oddity.rows, 'row')}, such as {oddity.example}"


def _report_spread(spread: Spread) -> str:
    return f"{spread.median:,} (median), {spread.p95:,} (95 %), {spread.largest:,} (longest)"


def report_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return the values that change, one a line; the two are the raw parameters before and after."""
    lines = [
        f"  {section}.{key}: {_show(old[section].get(key))} -> {_show(value)}"
        for section, values in new.items()
        for key, value in values.items()
        if old[section].get(key) != value
    ]
    return "\n".join(["params.yaml", *(lines or ["  nothing to change"])]) + "\n"


def _show(value: Any) -> str:
    """Return a value on one line; a list of sources by their files."""
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return ", ".join(str(source.get("path", source.get("kind"))) for source in value)
    text = (
        ", ".join(map(str, value))
        if isinstance(value, list | Mapping)
        else json.dumps(value, ensure_ascii=False)
    )
    return shorten_text(text, SHOWN_CHARS)


def report_run(estimate: RunEstimate) -> str:
    """Return what `make run` will do."""
    number = estimate.gpus
    gpus = f" on {number} GPUs, if they are {number} times as fast as one" if number > 1 else ""
    lines = [
        "make run",
        "  fetches the base model, collects and checks the rows, trains an adapter, compares it with the",
        "  base, exports it and writes its model card",
        f"  training     about {estimate.train_rows:,} rows with {estimate.train_tokens:,} tokens, "
        f"in {estimate.dtype}{gpus}",
        f"  test         about {estimate.test_rows:,} rows",
        f"  time         about {_show_minutes(estimate.minutes)} on this machine, after installation",
    ]
    cores = os.cpu_count() or 1
    if os.getloadavg()[0] > BUSY_SHARE * cores:
        lines.append(
            "               measured next to other work on this machine; without it the run is faster"
        )
    if estimate.minutes > LONG_MINUTES:
        exact = estimate.train_rows * SHORT_MINUTES / estimate.minutes
        rows = round(exact, 1 - math.floor(math.log10(exact)))  # two digits: it is an estimate
        lines.append(f"  sooner       about {SHORT_MINUTES} minutes with split.max_train_rows: {rows:.0f}")
    if estimate.test_rows < LEAST_TEST_ROWS:
        lines.append(
            "               so few test rows see large differences only; the report has the interval"
        )
    return "\n".join(lines) + "\n"


def _show_minutes(minutes: float) -> str:
    if minutes < 90:
        return f"{max(1, round(minutes))} minutes"
    return f"{minutes / 60:.1f} hours"
