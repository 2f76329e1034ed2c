"""Set up `params.yaml` for your own data: `make init DATA=data/support.csv LICENSE=cc-by-4.0`.

Reads a file, or a folder of them, and prints what it found: format, shape and columns, the kind of task,
classes, languages, lengths, duplicates, personal data. Then writes the task, the sources and what else
follows from the data into `params.yaml`. In doubt it names the candidates and the option that decides, and
writes nothing.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from flows.common.cli import run_command
from flows.init.estimate import estimate_run, make_token_counter
from flows.init.params_file import edit_params
from flows.init.proposal import Findings, check_license, propose, propose_max_length
from flows.init.reading import DataFile, check_copy, copy_under_data, find_files, read_data_files
from flows.init.report import report_changes, report_findings, report_run
from stages.common.artifacts import artifacts, atomic_write
from stages.common.errors import InputError
from stages.common.logs import show_count
from stages.common.params.loading import load_params
from stages.common.records import ORIGINS, Row, separate_refused
from stages.common.sources.detection.survey import survey_rows
from stages.common.sources.detection.task_kind import Kind, TaskKind, detect_conversations, detect_task_kind
from stages.common.sources.detection.tool_use import measure_tool_use
from stages.common.sources.files.formats import FormatOptions
from stages.common.sources.files.shapes import Columns
from stages.common.spool import join

logger = logging.getLogger("flows.init")

PARAMS = Path("params.yaml")
LANGUAGE_SAMPLE_ROWS = 2000


def main(arguments: Sequence[str] | None = None) -> int:
    """Set up `params.yaml`; return the exit code."""
    options = _make_parser().parse_args(arguments)
    return run_command(lambda: init(options))


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="perennial init", description=__doc__.split("\n")[0])
    parser.add_argument(
        "data", type=Path, help="a file of rows, or a folder of them; copied to data/ if elsewhere"
    )
    parser.add_argument(
        "--license", required=True, help="license under which you may train on the rows, as an SPDX id"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would change, and write nothing")
    parser.add_argument("--origin", choices=ORIGINS, default="human", help="who wrote the rows")
    parser.add_argument("--system-prompt", help="system prompt of rows that have none; '' for none")
    parser.add_argument(
        "--language", action="append", help="ISO 639 code, instead of detecting it; may be repeated"
    )
    task = parser.add_argument_group("task, where detection is in doubt")
    task.add_argument("--kind", choices=("json", "label", "text", "chat", "tools"), help="kind of answer")
    task.add_argument("--label-key", help="key of a JSON answer whose value is its class")
    reading = parser.add_argument_group("format and columns, where detection is in doubt")
    reading.add_argument("--format", choices=("jsonl", "json", "csv", "parquet"))
    reading.add_argument("--encoding", help="encoding of the file, such as cp1252")
    reading.add_argument(
        "--delimiter", type=_read_delimiter, help="delimiter of a CSV: one character, or 'tab'"
    )
    reading.add_argument(
        "--column-names",
        metavar="NAMES",
        type=_split_names,
        default=(),
        help="column names of a CSV without a header, separated by commas",
    )
    reading.add_argument("--records-key", help="key of the rows in a JSON object")
    reading.add_argument("--shape", choices=("chat", "sharegpt", "alpaca", "pair", "calls"))
    parts = ("messages", "prompt", "context", "completion", "system", "tools", "rejected", "rating", "group")
    for part in parts:
        reading.add_argument(f"--{part}-column", metavar="NAME")
    reading.add_argument(
        "--tag-columns",
        metavar="NAMES",
        type=_split_names,
        default=(),
        help="columns to keep as tags, separated by commas",
    )
    return parser


def init(options: argparse.Namespace) -> int:
    """Detect, report and write; return the exit code.

    Raises:
        InputError: the data cannot be read or leave doubt, or the licence is unknown; nothing is written.
        ParamsError: `params.yaml` is wrong before, or would be after.
    """
    license = check_license(options.license)
    text = PARAMS.read_text(encoding="utf-8")
    load_params(PARAMS)
    params = yaml.safe_load(text)
    folder = options.data if options.data.is_dir() else None
    files = read_data_files(
        find_files(options.data),
        folder,
        license,
        options.origin,
        FormatOptions.of(options),
        Columns.of(options),
    )
    for file in files:
        check_copy(file)
    count_tokens, is_exact = make_token_counter(artifacts("fetch_base"))
    rows = join_right_rows(files)
    task = detect_task(files, options.kind, options.label_key)
    current = params["finetune"]["max_length"]
    survey = survey_rows(
        rows,
        task,
        count_tokens,
        current,
        lambda done: show_count(logger, done, f"of {len(rows):,} rows measured"),
    )
    survey = survey.with_limit(max(current, propose_max_length(survey.row_tokens, params)))
    found = Findings(
        files=files,
        task=task,
        survey=survey,
        tool_use=measure_tool_use(rows),
        languages=dict.fromkeys(options.language, 1) if options.language else count_languages(rows),
    )
    sys.stdout.write(report_findings(found, is_exact))
    changes = propose(found, license, options.origin, options.system_prompt, params)
    edited = edit_params(text, changes)
    after = yaml.safe_load(edited)
    sys.stdout.write(report_changes(params, {name: _pick(after[name], changes[name]) for name in changes}))
    if options.dry_run:
        sys.stdout.write("nothing written (--dry-run)\n")
    else:
        write_params(edited, files)
    sys.stdout.write(report_run(estimate_run(found.survey, after, artifacts("fetch_base"))))
    return 0


def detect_task(files: Sequence[DataFile], kind: Kind | None, label_key: str | None) -> TaskKind:
    """Return the kind of task of all files together.

    Raises:
        InputError: a kind is in doubt, or the files are of different kinds.
    """
    if kind is None and len(files) > 1:
        kinds = {file.origin: _detect_kind([file], None, label_key).kind for file in files}
        if "tools" in kinds.values() and set(kinds.values()) <= {"tools", "chat", "text"}:
            return _detect_kind(files, "tools", None)  # an answer of this kind may be text
        if len(set(kinds.values())) > 1:
            raise InputError(
                "the files are of different kinds: "
                + ", ".join(f"{path} is {kind}" for path, kind in kinds.items()),
                "train on one kind at a time, or choose with --kind for all of them",
            )
    return _detect_kind(files, kind, label_key)


def _detect_kind(files: Sequence[DataFile], kind: Kind | None, label_key: str | None) -> TaskKind:
    rows = join_right_rows(files)
    conversations = detect_conversations(rows, kind) if label_key is None else None
    return conversations or detect_task_kind((row.answer for row in rows), kind, label_key)


def join_right_rows(files: Sequence[DataFile]) -> Sequence[Row]:
    """Return the rows of all files but those whose answer is rated as bad: no answer of the task.

    Raises:
        InputError: none is left.
    """
    rows = reduce(join, (separate_refused(file.collected.rows)[0] for file in files))
    if not rows:
        raise InputError(
            "every answer is rated as bad: there is none to learn", "add rows whose rating is true"
        )
    return rows


def count_languages(rows: Sequence[Row]) -> dict[str, int] | None:
    """Return questions by language, of a sample; None if the detector is not installed."""
    from stages.common.sources.detection.languages import NO_LANGUAGE, SHORT, detect_language

    step = max(1, len(rows) // LANGUAGE_SAMPLE_ROWS)
    try:
        found = Counter(detect_language(row.question) for row in rows[::step])
    except InputError:
        return None
    return {code: number for code, number in found.most_common() if code not in (SHORT, NO_LANGUAGE)}


def write_params(text: str, files: Sequence[DataFile]) -> None:
    """Copy the files under data/ where they are not, then replace `params.yaml` if it passes the checks."""
    with atomic_write(PARAMS) as new:
        new.write_text(text, encoding="utf-8")
        load_params(new)
        for file in files:
            if copy_under_data(file):
                sys.stdout.write(f"copied {file.origin} to {file.path}, where DVC sees it change\n")


def _pick(section: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: section[key] for key in keys}


def _read_delimiter(text: str) -> str:
    """Return the character that an option names."""
    return "\t" if text in ("tab", "\\t") else text


def _split_names(names: str) -> tuple[str, ...]:
    """Return names that are separated by commas."""
    return tuple(filter(None, map(str.strip, names.split(","))))


if __name__ == "__main__":
    sys.exit(main())
