"""Curate: keep the rows that are fit for training, and reject the others with a reason.

In: `artifacts/collect/rows.parquet`.
Out: `artifacts/curate/rows.parquet`, `task.json` with the task that they are rows of (a null `task.labels`
is resolved here), and `rejects.jsonl` with each rejected row and its reason;
`reports/curate/metrics.json` with the counts, and `rows.svg`.
Run: `python -m stages.curate`

A rule is a function from a row to None (keep) or a `Rejection` with a reason. Rules over the whole table
(conflicts, duplicates) return a `Rejection` for each row that they reject. Rules run in the order in which
`main` lists them, and the reason is that of the first rule that rejects a row.

Feedback from production comes last: no other row is rejected because of what users send.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.common.artifacts import artifacts, reports, write_json, write_text
from stages.common.errors import InputError
from stages.common.logs import get_logger, run_stage
from stages.common.near_duplicates import SimilarTexts, join_prompt
from stages.common.params.loading import load_params
from stages.common.personal_data import holds
from stages.common.records import Message, Row, format_canonical_json, make_row, read_rows, write_rows
from stages.common.svg import draw_figure
from stages.common.task.kinds import TASK_FILE, resolve_task
from stages.common.task.protocol import Task

logger = get_logger("curate")

MAX_SAME_CHARACTERS = 30  # in a row; a ruled line in Markdown is shorter
MAX_SAME_WORDS = 8  # in a row
MIN_TEXT_SHARE = 0.3  # letters and digits among the visible characters; "2+2=?" has 0.4
MIN_CHARS_TO_JUDGE = 10  # a shorter question may be all signs: ":-)"


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a row is rejected: a word to count by, and a detail."""

    reason: str
    detail: str


Rule = Callable[[Row], Rejection | None]
TableRule = Callable[[Sequence[Row]], dict[int, Rejection]]


def normalize_row(row: Row) -> Row:
    """Return the row with its texts normalized; the id is that of the new text.

    NFC, plain spaces and line ends, no control characters, no space around the text or at line
    ends. Runs of spaces become one only in a text of one line: elsewhere they indent code.
    """
    messages = [Message(message.role, normalize_text(message.content)) for message in row.messages]
    if tuple(messages) == row.messages:
        return row
    if not all(message.content for message in messages if message.role != "system"):
        return row  # a message would be empty: the length rule rejects the original
    group = None if row.group == row.id else row.group
    return make_row(messages, row.source, row.license, group=group, tags=row.tags, origin=row.origin)


def normalize_text(text: str) -> str:
    """Return the normalized form of a text."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    text = "".join(" " if unicodedata.category(c) == "Zs" else c for c in text)
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE).strip("\ufeff \t\n")
    return text if "\n" in text else re.sub(r"[ \t]+", " ", text)


def limit_question_length(min_chars: int, max_chars: int) -> Rule:
    """Return the rule that rejects shorter and longer questions."""

    def rule(row: Row) -> Rejection | None:
        length = len(row.question.strip())
        if not normalize_text(row.question):
            return Rejection("empty_question", "no visible character")
        if length < min_chars:
            return Rejection("short_question", f"{length} characters, at least {min_chars} required")
        if length > max_chars:
            return Rejection("long_question", f"{length} characters, at most {max_chars} required")
        return None

    return rule


def limit_answer_length(max_chars: int) -> Rule:
    """Return the rule that rejects empty and longer answers."""

    def rule(row: Row) -> Rejection | None:
        length = len(row.answer.strip())
        if not normalize_text(row.answer):
            return Rejection("empty_answer", "no visible character")
        if length > max_chars:
            return Rejection("long_answer", f"{length} characters, at most {max_chars} required")
        return None

    return rule


def check_answer(task: Task) -> Rule:
    """Return the rule that rejects answers that are not valid for the task."""

    def rule(row: Row) -> Rejection | None:
        problem = task.find_problem(row.answer)
        return Rejection("invalid_answer", problem) if problem else None

    return rule


def find_repetition(row: Row) -> Rejection | None:
    """Reject a row with a character or a word repeated many times."""
    for role, text in _list_texts(row):
        if re.search(rf"(\S)\1{{{MAX_SAME_CHARACTERS},}}", text):
            return Rejection(
                "repetition", f"one character more than {MAX_SAME_CHARACTERS} times in a row ({role})"
            )
        run, last = 0, ""
        for word in text.casefold().split():
            run = run + 1 if word == last else 1
            last = word
            if run > MAX_SAME_WORDS:
                return Rejection(
                    "repetition", f"{word[:20]!r} more than {MAX_SAME_WORDS} times in a row ({role})"
                )
    return None


def find_non_text(row: Row) -> Rejection | None:
    """Reject a row whose question is mostly neither letters nor digits."""
    visible = [c for c in row.question if not c.isspace()]
    share = sum(unicodedata.category(c)[0] in "LMN" for c in visible) / max(1, len(visible))
    if len(visible) >= MIN_CHARS_TO_JUDGE and share < MIN_TEXT_SHARE:
        return Rejection(
            "mostly_not_text", f"{share:.0%} letters and digits, at least {MIN_TEXT_SHARE:.0%} required"
        )
    return None


def find_personal_data(kinds: Sequence[str]) -> Rule:
    """Return the rule that rejects rows with personal data of `kinds`; the detail does not repeat it."""

    def rule(row: Row) -> Rejection | None:
        for role, text in _list_texts(row):
            for kind in kinds:
                if holds(kind, text):
                    return Rejection(f"personal_{kind}", f"in the message of the {role}")
        return None

    return rule


def sort_feedback_last(rows: Sequence[Row]) -> list[Row]:
    """Return the rows in their order, with those from feedback after the others."""
    return sorted(rows, key=lambda row: row.origin == "feedback")


def find_contradicting_feedback(task: Task) -> TableRule:
    """Return the rule that rejects feedback whose prompt has another answer in other rows."""

    def rule(rows: Sequence[Row]) -> dict[int, Rejection]:
        answers: dict[str, set[str]] = defaultdict(set)
        for row in rows:
            if row.origin != "feedback":
                answers[_prompt_key(row)].add(task.canonical(row.answer))
        return {
            number: Rejection("contradicting_feedback", "other rows have another answer to this prompt")
            for number, row in enumerate(rows)
            if row.origin == "feedback"
            and answers.get(_prompt_key(row), set()) - {task.canonical(row.answer)}
        }

    return rule


def find_conflicting_answers(task: Task) -> TableRule:
    """Return the rule that rejects all rows of a prompt with several answers: any of them may be wrong."""

    def rule(rows: Sequence[Row]) -> dict[int, Rejection]:
        answers: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for number, row in enumerate(rows):
            answers[_prompt_key(row)][task.canonical(row.answer)].append(number)
        return {
            number: Rejection("conflicting_answer", f"{len(by_answer)} different answers to one prompt")
            for by_answer in answers.values()
            if len(by_answer) > 1
            for numbers in by_answer.values()
            for number in numbers
        }

    return rule


def find_exact_duplicates(rows: Sequence[Row]) -> dict[int, Rejection]:
    """Reject all but the first of the rows with the same messages."""
    seen: set[str] = set()
    rejected = {}
    for number, row in enumerate(rows):
        if row.id in seen:
            rejected[number] = Rejection("exact_duplicate", f"of {row.id}")
        seen.add(row.id)
    return rejected


def find_near_duplicates(threshold: float, task: Task) -> TableRule:
    """Return the rule that rejects near duplicates of an earlier prompt with the same answer."""

    def rule(rows: Sequence[Row]) -> dict[int, Rejection]:
        by_answer: dict[str, list[int]] = defaultdict(list)
        for number, row in enumerate(rows):
            by_answer[task.canonical(row.answer)].append(number)
        rejected = {}
        for numbers in by_answer.values():
            if len(numbers) == 1:
                continue
            prompts = {number: join_prompt(rows[number]) for number in numbers}
            index = SimilarTexts(threshold, prompts.values())
            kept: list[int] = []
            for number in numbers:
                near = next(iter(index.find_near(prompts[number])), None)
                if near is None:
                    index.add(prompts[number])
                    kept.append(number)
                else:
                    earlier, score = near
                    rejected[number] = Rejection(
                        "near_duplicate", f"{score:.3f} like {rows[kept[earlier]].id}"
                    )
        return rejected

    return rule


def _list_texts(row: Row) -> Iterable[tuple[str, str]]:
    return ((message.role, message.content) for message in row.messages if message.role != "system")


def _prompt_key(row: Row) -> str:
    return format_canonical_json(
        [[message.role, " ".join(message.content.casefold().split())] for message in row.prompt]
    )


def apply_rules(
    rows: Sequence[Row], rules: Sequence[Rule], table_rules: Sequence[TableRule]
) -> tuple[list[Row], list[tuple[Row, Rejection]]]:
    """Return the rows kept, and the rows rejected with their reasons, both in their order."""
    rejections: dict[int, Rejection] = {}
    for number, row in enumerate(rows):
        rejection = next((rejection for rule in rules if (rejection := rule(row))), None)
        if rejection:
            rejections[number] = rejection
    for table_rule in table_rules:
        left = [number for number in range(len(rows)) if number not in rejections]
        found = table_rule([rows[number] for number in left])
        rejections |= {left[place]: rejection for place, rejection in found.items()}
    kept = [row for number, row in enumerate(rows) if number not in rejections]
    return kept, [(rows[number], rejections[number]) for number in sorted(rejections)]


def count_rows(
    rows_in: int, kept: Sequence[Row], rejected: Sequence[tuple[Row, Rejection]]
) -> dict[str, Any]:
    """Return the counts of the report.

    Raises:
        AssertionError: a row was lost, which is a bug.
    """
    if rows_in != len(kept) + len(rejected):
        raise AssertionError(f"{rows_in} rows went in, {len(kept)} were kept and {len(rejected)} rejected")
    return {
        "rows_in": rows_in,
        "kept": len(kept),
        "rejected": len(rejected),
        "kept_share": round(len(kept) / rows_in, 6) if rows_in else 0.0,
        "rejected_by_reason": dict(sorted(Counter(rejection.reason for _, rejection in rejected).items())),
        "kept_by_source": dict(sorted(Counter(row.source for row in kept).items())),
        "groups_kept": len({row.group for row in kept}),
    }


def format_rejections(rejected: Sequence[tuple[Row, Rejection]]) -> str:
    """Return one JSON object a line: id, reason, detail, row."""
    lines = (
        {
            "id": row.id,
            "reason": rejection.reason,
            "detail": rejection.detail,
            "row": {**asdict(row), "tags": dict(row.tags)},
        }
        for row, rejection in rejected
    )
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def plot_rows(kept: int, by_reason: Mapping[str, int], path: Path) -> None:
    """Plot the rows kept, and those rejected for each reason."""
    names = ["kept", *sorted(by_reason, key=lambda reason: (-by_reason[reason], reason))]
    counts = [kept, *(by_reason[name] for name in names[1:])]
    with draw_figure(path, 7, 1.2 + 0.4 * len(names)) as drawing:
        axes = drawing.subplots()
        bars = axes.barh(names, counts, color=["#2a9d8f"] + ["#e76f51"] * (len(names) - 1))
        axes.bar_label(bars, labels=[f"{count:,}" for count in counts], padding=3)
        axes.invert_yaxis()
        axes.set_xscale("symlog")  # one rejected row must be visible next to thousands kept
        axes.set_xlim(0, max(counts) * 4 + 1)
        axes.set_xlabel("rows (logarithmic)")
        axes.set_title("Rows kept, and rejected by reason")
        axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Separate the collected rows into kept and rejected ones, and write both with their counts."""
    everything = load_params()
    params = everything.curate
    rows = [
        normalize_row(row) for row in sort_feedback_last(read_rows(artifacts("collect") / "rows.parquet"))
    ]
    # Feedback adds no label to a closed set.
    own = [row for row in rows if row.origin != "feedback"] or rows
    task = resolve_task(everything.task, [row.answer for row in own])
    rules: list[Rule] = [
        limit_question_length(params.min_question_chars, params.max_question_chars),
        limit_answer_length(params.max_answer_chars),
        check_answer(task),
        find_repetition,
        find_non_text,
        find_personal_data(params.personal_data),
    ]
    table_rules: list[TableRule] = [
        *([find_contradicting_feedback(task), find_conflicting_answers(task)] if task.has_one_answer else []),
        find_exact_duplicates,
        find_near_duplicates(params.near_duplicate_threshold, task),
    ]
    kept, rejected = apply_rules(rows, rules, table_rules)
    counts = count_rows(len(rows), kept, rejected)
    folder = artifacts("curate")
    write_text(folder / "rejects.jsonl", format_rejections(rejected))
    if not kept:
        raise InputError(
            f"all {len(rows)} rows were rejected: {counts['rejected_by_reason']}; the first: "
            f"{rejected[0][1].detail}",
            f"read the reasons in {folder / 'rejects.jsonl'}, then correct the data or the limits",
        )
    write_rows(folder / "rows.parquet", kept)
    write_json(TASK_FILE, task.describe())
    write_json(reports("curate") / "metrics.json", counts)
    plot_rows(len(kept), counts["rejected_by_reason"], reports("curate") / "rows.svg")
    logger.info("%d rows in, %d kept, %d rejected", len(rows), len(kept), len(rejected))
    for reason, count in counts["rejected_by_reason"].items():
        logger.info("rejected %d: %s", count, reason)


if __name__ == "__main__":
    run_stage(main)
