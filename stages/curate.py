"""Curate: keep the rows worth learning from, and say of every other one why it goes.

In: `artifacts/collect/rows.parquet`.
Out: `artifacts/curate/rows.parquet`, `task.json` with the task that they are rows of (a null `task.labels`
is resolved here), and `rejects.jsonl` with each dropped row and its reason;
`reports/curate/metrics.json` with the counts, and `rows.svg`.
Run: `python -m stages.curate`

A rule is a function from a row to None (keep) or a `Drop` with a reason. Rules over the whole
table (conflicts, duplicates) return a `Drop` for each row that they drop. Rules run in the order
in which `main` lists them, and a row's reason is that of the first rule that drops it.

Feedback from production comes last and yields: whatever users send, no other row goes because of it.
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
from stages.common.near_duplicates import SimilarTexts, prompt_text
from stages.common.params.loading import load_params
from stages.common.personal_data import holds
from stages.common.records import Message, Row, canonical_json, make_row, read_rows, write_rows
from stages.common.svg import draw_figure
from stages.common.task.kinds import TASK_FILE, resolve_task
from stages.common.task.protocol import Task

log = get_logger("curate")

MAX_SAME_CHARACTERS = 30  # in a row; a ruled line in Markdown is shorter
MAX_SAME_WORDS = 8  # in a row
MIN_TEXT_SHARE = 0.3  # letters and digits among the visible characters; "2+2=?" has 0.4
MIN_CHARS_TO_JUDGE = 10  # a shorter question may be all signs: ":-)"


@dataclass(frozen=True, slots=True)
class Drop:
    """Why a row goes: a word to count by, and what was seen."""

    reason: str
    detail: str


Rule = Callable[[Row], Drop | None]
TableRule = Callable[[Sequence[Row]], dict[int, Drop]]


def normalise(row: Row) -> Row:
    """Return the row with one spelling of the same text; the id follows the new text.

    NFC, plain spaces and line ends, no control characters, no space around the text or at line
    ends. Runs of spaces become one only in a text of one line: elsewhere they indent code.
    """
    messages = [Message(message.role, normalised(message.content)) for message in row.messages]
    if tuple(messages) == row.messages:
        return row
    if not all(message.content for message in messages if message.role != "system"):
        return row  # nothing is left of a message: the length rule names it as it came
    group = None if row.group == row.id else row.group
    return make_row(messages, row.source, row.license, group=group, tags=row.tags, origin=row.origin)


def normalised(text: str) -> str:
    """Return the one spelling of `text`."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    text = "".join(" " if unicodedata.category(c) == "Zs" else c for c in text)
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE).strip("\ufeff \t\n")
    return text if "\n" in text else re.sub(r"[ \t]+", " ", text)


def question_length(min_chars: int, max_chars: int) -> Rule:
    """Drop rows whose question is shorter or longer than that."""

    def rule(row: Row) -> Drop | None:
        length = len(row.question.strip())
        if not normalised(row.question):
            return Drop("empty_question", "no visible character")
        if length < min_chars:
            return Drop("short_question", f"{length} characters, at least {min_chars} wanted")
        if length > max_chars:
            return Drop("long_question", f"{length} characters, at most {max_chars} wanted")
        return None

    return rule


def answer_length(max_chars: int) -> Rule:
    """Drop rows whose answer is empty or longer than that."""

    def rule(row: Row) -> Drop | None:
        length = len(row.answer.strip())
        if not normalised(row.answer):
            return Drop("empty_answer", "no visible character")
        if length > max_chars:
            return Drop("long_answer", f"{length} characters, at most {max_chars} wanted")
        return None

    return rule


def answer_of(task: Task) -> Rule:
    """Drop rows whose answer is not one of the task."""

    def rule(row: Row) -> Drop | None:
        problem = task.find_problem(row.answer)
        return Drop("invalid_answer", problem) if problem else None

    return rule


def repetition(row: Row) -> Drop | None:
    """Drop rows in which a character or a word is said over and over."""
    for role, text in _said(row):
        if re.search(rf"(\S)\1{{{MAX_SAME_CHARACTERS},}}", text):
            return Drop(
                "repetition", f"one character more than {MAX_SAME_CHARACTERS} times in a row ({role})"
            )
        run, last = 0, ""
        for word in text.casefold().split():
            run = run + 1 if word == last else 1
            last = word
            if run > MAX_SAME_WORDS:
                return Drop("repetition", f"{word[:20]!r} more than {MAX_SAME_WORDS} times in a row ({role})")
    return None


def mostly_not_text(row: Row) -> Drop | None:
    """Drop rows whose question is mostly signs."""
    visible = [c for c in row.question if not c.isspace()]
    share = sum(unicodedata.category(c)[0] in "LMN" for c in visible) / max(1, len(visible))
    if len(visible) >= MIN_CHARS_TO_JUDGE and share < MIN_TEXT_SHARE:
        return Drop(
            "mostly_not_text", f"{share:.0%} letters and digits, at least {MIN_TEXT_SHARE:.0%} wanted"
        )
    return None


def personal_data(kinds: Sequence[str]) -> Rule:
    """Drop rows in which one of `kinds` of personal data stands; the detail does not repeat it."""

    def rule(row: Row) -> Drop | None:
        for role, text in _said(row):
            for kind in kinds:
                if holds(kind, text):
                    return Drop(f"personal_{kind}", f"in what the {role} says")
        return None

    return rule


def feedback_last(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with those from feedback behind the others, else in the order they came."""
    return sorted(rows, key=lambda row: row.origin == "feedback")


def contradicting_feedback(task: Task) -> TableRule:
    """Drop the feedback rows whose prompt has another answer in rows of other origin."""

    def rule(rows: Sequence[Row]) -> dict[int, Drop]:
        answers: dict[str, set[str]] = defaultdict(set)
        for row in rows:
            if row.origin != "feedback":
                answers[_prompt_key(row)].add(task.canonical(row.answer))
        return {
            number: Drop("contradicting_feedback", "other rows answer this prompt otherwise")
            for number, row in enumerate(rows)
            if row.origin == "feedback"
            and answers.get(_prompt_key(row), set()) - {task.canonical(row.answer)}
        }

    return rule


def conflicting_answers(task: Task) -> TableRule:
    """Drop all rows of a prompt that has several answers: none is known to be the right one."""

    def rule(rows: Sequence[Row]) -> dict[int, Drop]:
        answers: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for number, row in enumerate(rows):
            answers[_prompt_key(row)][task.canonical(row.answer)].append(number)
        return {
            number: Drop("conflicting_answer", f"{len(by_answer)} different answers to one prompt")
            for by_answer in answers.values()
            if len(by_answer) > 1
            for numbers in by_answer.values()
            for number in numbers
        }

    return rule


def exact_duplicates(rows: Sequence[Row]) -> dict[int, Drop]:
    """Drop all but the first of the rows with the same messages."""
    seen: set[str] = set()
    dropped = {}
    for number, row in enumerate(rows):
        if row.id in seen:
            dropped[number] = Drop("exact_duplicate", f"of {row.id}")
        seen.add(row.id)
    return dropped


def near_duplicates(threshold: float, task: Task) -> TableRule:
    """Drop rows whose prompt is nearly that of an earlier kept row with the same answer."""

    def rule(rows: Sequence[Row]) -> dict[int, Drop]:
        by_answer: dict[str, list[int]] = defaultdict(list)
        for number, row in enumerate(rows):
            by_answer[task.canonical(row.answer)].append(number)
        dropped = {}
        for numbers in by_answer.values():
            if len(numbers) == 1:
                continue
            prompts = {number: prompt_text(rows[number]) for number in numbers}
            index = SimilarTexts(threshold, prompts.values())
            kept: list[int] = []
            for number in numbers:
                near = next(iter(index.near(prompts[number])), None)
                if near is None:
                    index.add(prompts[number])
                    kept.append(number)
                else:
                    earlier, score = near
                    dropped[number] = Drop("near_duplicate", f"{score:.3f} like {rows[kept[earlier]].id}")
        return dropped

    return rule


def _said(row: Row) -> Iterable[tuple[str, str]]:
    return ((message.role, message.content) for message in row.messages if message.role != "system")


def _prompt_key(row: Row) -> str:
    return canonical_json(
        [[message.role, " ".join(message.content.casefold().split())] for message in row.prompt]
    )


def apply(
    rows: Sequence[Row], rules: Sequence[Rule], table_rules: Sequence[TableRule]
) -> tuple[list[Row], list[tuple[Row, Drop]]]:
    """Return the rows kept, and the rows dropped with their reasons, both in the order they came."""
    drops: dict[int, Drop] = {}
    for number, row in enumerate(rows):
        drop = next((drop for rule in rules if (drop := rule(row))), None)
        if drop:
            drops[number] = drop
    for table_rule in table_rules:
        left = [number for number in range(len(rows)) if number not in drops]
        found = table_rule([rows[number] for number in left])
        drops |= {left[place]: drop for place, drop in found.items()}
    kept = [row for number, row in enumerate(rows) if number not in drops]
    return kept, [(rows[number], drops[number]) for number in sorted(drops)]


def figures(rows_in: int, kept: Sequence[Row], dropped: Sequence[tuple[Row, Drop]]) -> dict[str, Any]:
    """Return the counts of the report.

    Raises:
        AssertionError: a row was lost on the way, which no input can cause.
    """
    if rows_in != len(kept) + len(dropped):
        raise AssertionError(f"{rows_in} rows went in, {len(kept)} were kept and {len(dropped)} dropped")
    return {
        "rows_in": rows_in,
        "kept": len(kept),
        "dropped": len(dropped),
        "kept_share": round(len(kept) / rows_in, 6) if rows_in else 0.0,
        "dropped_by_reason": dict(sorted(Counter(drop.reason for _, drop in dropped).items())),
        "kept_by_source": dict(sorted(Counter(row.source for row in kept).items())),
        "groups_kept": len({row.group for row in kept}),
    }


def rejects_jsonl(dropped: Sequence[tuple[Row, Drop]]) -> str:
    """Return one JSON object a line: id, reason, detail, row."""
    lines = (
        {
            "id": row.id,
            "reason": drop.reason,
            "detail": drop.detail,
            "row": {**asdict(row), "tags": dict(row.tags)},
        }
        for row, drop in dropped
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
    """Sort the collected rows into kept and dropped, and write both with their counts."""
    everything = load_params()
    params = everything.curate
    rows = [normalise(row) for row in feedback_last(read_rows(artifacts("collect") / "rows.parquet"))]
    # Feedback adds no label to a closed set.
    own = [row for row in rows if row.origin != "feedback"] or rows
    task = resolve_task(everything.task, [row.answer for row in own])
    rules: list[Rule] = [
        question_length(params.min_question_chars, params.max_question_chars),
        answer_length(params.max_answer_chars),
        answer_of(task),
        repetition,
        mostly_not_text,
        personal_data(params.personal_data),
    ]
    table_rules: list[TableRule] = [
        *([contradicting_feedback(task), conflicting_answers(task)] if task.has_one_answer else []),
        exact_duplicates,
        near_duplicates(params.near_duplicate_threshold, task),
    ]
    kept, dropped = apply(rows, rules, table_rules)
    counts = figures(len(rows), kept, dropped)
    folder = artifacts("curate")
    write_text(folder / "rejects.jsonl", rejects_jsonl(dropped))
    if not kept:
        raise InputError(
            f"all {len(rows)} rows were dropped: {counts['dropped_by_reason']}; the first: "
            f"{dropped[0][1].detail}",
            f"read the reasons in {folder / 'rejects.jsonl'}, then mend the data or the limits under curate",
        )
    write_rows(folder / "rows.parquet", kept)
    write_json(TASK_FILE, task.describe())
    write_json(reports("curate") / "metrics.json", counts)
    plot_rows(len(kept), counts["dropped_by_reason"], reports("curate") / "rows.svg")
    log.info("%d rows in, %d kept, %d dropped", len(rows), len(kept), len(dropped))
    for reason, count in counts["dropped_by_reason"].items():
        log.info("dropped %d: %s", count, reason)


if __name__ == "__main__":
    run_stage(main)
