"""Curate: keep the rows that are fit for training, and reject the others with a reason.

In: `artifacts/collect/rows.parquet`.
Out: `artifacts/curate/rows.parquet`, `refused.parquet` with the rows whose answer people found bad,
`task.json` with the task that they are rows of (a null `task.labels` is resolved here), `rejects.jsonl` with
each rejected row and its reason, and `changes.jsonl` with each text that was changed, before and after (what
a row is rejected for as personal data or a secret is in neither);
`reports/curate/metrics.json` with the counts, and `rows.svg`.
Run: `python -m stages.curate`

A rule is a function from a row to None (keep) or a `Rejection` with a reason. Rules over the whole table
(conflicts, duplicates) return a `Rejection` for each row that they reject. Rules run in the order in which
`list_rules` and `list_table_rules` have them, and the reason is that of the first rule that rejects a row.

Rows of one conversation get one group. Feedback from production comes last: no other row is rejected, and no
two groups are joined, because of what users send.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stages.common.artifacts import artifacts, reports, write_json, write_lines
from stages.common.chat.conversations import join_conversations
from stages.common.errors import InputError
from stages.common.logs import ROWS_A_STEP, get_logger, run_stage, show_progress
from stages.common.messages import LearnedTurns
from stages.common.params.loading import load_params
from stages.common.params.stages import Curate
from stages.common.records import (
    Row,
    count_chars,
    exclude_feedback,
    read_rows,
    separate_refused,
    sort_feedback_last,
    write_rows,
)
from stages.common.spool import join, pick, spool
from stages.common.svg import draw_figure
from stages.common.task.kinds import TASK_FILE, resolve_task
from stages.common.task.protocol import Task
from stages.curate.calls import check_calls
from stages.curate.duplicates import (
    TableRule,
    find_confirmed_answers,
    find_conflicting_answers,
    find_contradicting_feedback,
    find_exact_duplicates,
    find_near_duplicates,
    number_copies,
)
from stages.curate.private import format_rejects, redact_changes
from stages.curate.rules import (
    Rejection,
    Rule,
    check_answer,
    find_personal_data,
    limit_answer_length,
    limit_question_length,
    limit_repetition,
    require_difference,
    require_text,
)
from stages.curate.spelling import count_changes, format_changes, spell_rows

logger = get_logger("curate")


def list_rules(
    params: Curate, task: Task, system_prompt: str | None, learned_turns: LearnedTurns
) -> list[Rule]:
    """Return the rules for one row; what a parameter sets to null is not among them.

    Args:
        system_prompt: the operator's own; personal data in it, such as an address for support, is no reason.
        learned_turns: which answers of a row are learned, and so looked at.
    """
    rules: list[Rule] = [
        find_personal_data(params.personal_data, system_prompt),  # the first, so that no other keeps its text
        limit_question_length(params.min_question_chars, params.max_question_chars),
        limit_answer_length(params.max_answer_chars, learned_turns),
        check_answer(task, learned_turns),
        check_calls(task),
        require_difference(task),
        limit_repetition(params.max_same_characters, params.max_same_words),
    ]
    if params.min_text_share is not None:
        rules.append(require_text(params.min_text_share))
    return rules


def list_table_rules(params: Curate, task: Task) -> list[TableRule]:
    """Return the rules over all rows."""
    rules: list[TableRule] = [find_contradicting_feedback(task)]
    if params.on_conflicting_answers == "drop":
        rules.append(find_conflicting_answers(task))
    if params.on_exact_duplicates == "drop":
        rules.append(find_exact_duplicates)
    if params.near_duplicate_threshold is not None:
        rules.append(find_near_duplicates(params.near_duplicate_threshold, task))
    return rules


def list_refused_rules(params: Curate, system_prompt: str | None) -> list[Rule]:
    """Return the rules for a row whose answer was refused: that it is invalid can be why it was."""
    rules: list[Rule] = [
        find_personal_data(params.personal_data, system_prompt),
        limit_question_length(params.min_question_chars, params.max_question_chars),
        limit_answer_length(params.max_answer_chars),
    ]
    if params.min_text_share is not None:
        rules.append(require_text(params.min_text_share))
    return rules


def apply_rules(
    rows: Sequence[Row], rules: Sequence[Rule], table_rules: Sequence[TableRule]
) -> tuple[Sequence[Row], Sequence[tuple[Row, Rejection]]]:
    """Return the rows kept, and the rows rejected with their reasons, both in their order."""
    rejections: dict[int, Rejection] = {}
    for number, row in enumerate(rows):
        rejection = next((rejection for rule in rules if (rejection := rule(row))), None)
        if rejection:
            rejections[number] = rejection
        if (number + 1) % ROWS_A_STEP == 0:
            show_progress(logger, number + 1, len(rows), "rules")
    for table_rule in table_rules:
        left = [number for number in range(len(rows)) if number not in rejections]
        found = table_rule(pick(rows, left))
        rejections |= {left[place]: rejection for place, rejection in found.items()}
    kept = pick(rows, [number for number in range(len(rows)) if number not in rejections])
    rejected = ((rows[number], rejections[number]) for number in sorted(rejections))
    return kept, spool(rejected, lambda pair: count_chars(pair[0]))


def count_rows(
    rows_in: int,
    kept: Sequence[Row],
    rejected: Sequence[tuple[Row, Rejection]],
    refused: Sequence[Row] = (),
) -> dict[str, Any]:
    """Return the counts of the report.

    Args:
        refused: the rows kept apart, whose answer people found bad.

    Raises:
        AssertionError: a row was lost, which is a bug.
    """
    if rows_in != len(kept) + len(refused) + len(rejected):
        counted = (
            f"{len(kept)} were kept, {len(refused)} have a refused answer and {len(rejected)} are rejected"
        )
        raise AssertionError(f"{rows_in} rows went in, {counted}")
    sources: Counter[str] = Counter()
    groups = set()
    for row in kept:
        sources[row.source] += 1
        groups.add(row.group)
    return {
        "rows_in": rows_in,
        "kept": len(kept),
        "with_rejected_answer": sum(row.rejected is not None for row in kept),
        "refused_answers": len(refused),
        "rejected": len(rejected),
        "kept_share": round(len(kept) / rows_in, 6) if rows_in else 0.0,
        "rejected_by_reason": dict(sorted(Counter(rejection.reason for _, rejection in rejected).items())),
        "kept_by_source": dict(sorted(sources.items())),
        "groups_kept": len(groups),
    }


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
    spelled, changes = spell_rows(
        sort_feedback_last(read_rows(artifacts("collect") / "rows.parquet")), params.normalize
    )
    rows, refused = separate_refused(spelled)
    # Feedback adds no label to a closed set.
    own = exclude_feedback(rows) or rows
    task = resolve_task(everything.task, (row.answer for row in own))
    rules = list_rules(params, task, everything.task.system_prompt, everything.task.turns)
    kept, rejected = apply_rules(rows, rules, list_table_rules(params, task))
    bad, rejected_bad = apply_rules(
        refused,
        list_refused_rules(params, everything.task.system_prompt),
        [find_exact_duplicates, find_confirmed_answers(kept, task)],
    )
    rejected = join(rejected, rejected_bad) if rejected_bad else rejected
    groups = join_conversations(kept)
    counts = count_rows(len(spelled), kept, rejected, bad)
    joined = counts["groups_kept"] - len(set(groups))
    counts |= {
        **count_changes(changes),
        "groups_kept": len(set(groups)),
        "groups_joined_as_conversations": joined,
    }
    folder = artifacts("curate")
    write_lines(folder / "rejects.jsonl", format_rejects(rejected, params.personal_data))
    shown = redact_changes(changes, rejected, params.personal_data)
    write_lines(folder / "changes.jsonl", format_changes(shown))
    if not kept:
        raise InputError(
            f"all {len(spelled)} rows were rejected or have a refused answer: {counts['rejected_by_reason']}"
            + (f"; the first: {rejected[0][1].detail}" if rejected else ""),
            f"read the reasons in {folder / 'rejects.jsonl'}, then correct the data or the limits",
        )
    write_rows(
        folder / "rows.parquet",
        number_copies(
            row if row.group == group else replace(row, group=group)
            for row, group in zip(kept, groups, strict=True)
        ),
    )
    write_rows(folder / "refused.parquet", number_copies(bad))
    write_json(TASK_FILE, task.describe())
    write_json(reports("curate") / "metrics.json", counts)
    plot_rows(len(kept), counts["rejected_by_reason"], reports("curate") / "rows.svg")
    logger.info("%d rows in, %d kept, %d rejected", len(spelled), len(kept), len(rejected))
    if bad:
        logger.info("%d rows with a refused answer are kept apart", len(bad))
    for reason, count in counts["rejected_by_reason"].items():
        logger.info("rejected %d: %s", count, reason)
    for name, count in counts["messages_changed_by"].items():
        logger.info("changed %d messages: %s (before and after in %s)", count, name, folder / "changes.jsonl")
    if joined:
        logger.info("%d groups joined to others: their rows are turns of one conversation", joined)


if __name__ == "__main__":
    run_stage(main)
