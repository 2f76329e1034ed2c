"""Split: hold out whole groups for validation and test, and prove that no training row is like them.

In: `artifacts/curate/rows.parquet`, `refused.parquet`.
Out: `artifacts/split/{train,validation,test}.parquet`, and `refused.parquet` with the rows whose answer
people found bad, which are only for training; `reports/split/metrics.json` with the counts and the proof: no
group and no conversation on two sides, and no training prompt nearly that of a held-out row.
Run: `python -m stages.split`

A group is rows that belong together (the sentences of one template); a row without a group is its own group.
A row is a conversation. On the test side each answer that is judged is a row of its own, with the turns
before it. Feedback from production is used only for training: validation and test rows are the same without
it, so that models are compared on the same questions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from stages.common.artifacts import artifacts, reports, write_json
from stages.common.chat.conversations import find_shared_exchanges
from stages.common.chat.turns import unroll
from stages.common.errors import InputError
from stages.common.logs import get_logger, run_stage
from stages.common.params.loading import load_params
from stages.common.records import count_chars, exclude_feedback, read_rows, write_rows
from stages.common.similarity.compared_text import find_shared_parts
from stages.common.spool import pick, spool
from stages.common.statistics.row_counts import describe_counts, read_rejected_counts
from stages.common.statistics.sizes import choose_min_test_rows, choose_min_train_rows
from stages.common.task.kinds import read_task
from stages.split.leaks import clear_refused, prove_split, remove_known_answers, remove_near_duplicates
from stages.split.sides import (
    Sides,
    assign_sides,
    cap_training_rows,
    choose_group_labels,
    divide_rows,
    draw_training_rows,
    read_strata,
    select_feedback,
    shuffle_together,
)

logger = get_logger("split")


def check_sizes(
    sides: Sides,
    gone: Mapping[str, int],
    rows_in: int,
    groups_in: int,
    min_train_rows: int,
    min_test_rows: int,
    max_train_rows: int | None = None,
) -> None:
    """Check that the split is large enough to train and to evaluate.

    Args:
        gone: how many rows were dropped on the way here, by reason.
        max_train_rows: as `split.max_train_rows`.

    Raises:
        InputError: with the numbers of both sides, and where the rows went.
    """
    problems = [
        f"{side}: {len(rows)} rows, and {least} are required (split.min_{side}_rows)"
        for side, rows, least in (("train", sides.train, min_train_rows), ("test", sides.test, min_test_rows))
        if len(rows) < least
    ]
    if not problems:
        return
    if lost := describe_counts(gone):
        problems.append(f"rows that went: {lost}")
    fix = (
        "collect more rows or more groups (for the packaged default: collect.sources rows_per_template), "
        "raise split.test_fraction or split.max_test_rows_per_group, or set split.min_train_rows, "
        "split.min_test_rows and evaluate.min_test_rows to lower numbers"
    )
    if max_train_rows is not None and len(sides.train) < min_train_rows and max_train_rows < min_train_rows:
        fix = f"raise split.max_train_rows from {max_train_rows} to {min_train_rows} or more"
    elif sum(gone.values()) > rows_in / 2:
        fix = f"most rows went for the reasons above: look at these first; then {fix}"
    raise InputError(
        f"the split of {rows_in} rows in {groups_in} groups is too small\n" + "\n".join(problems), fix
    )


def count_sides(sides: Sides, labels: Mapping[str, str], stratify_by: str | None) -> dict[str, Any]:
    """Return rows and groups of each side, in all and by label."""
    report: dict[str, Any] = {
        "rows": {side: len(rows) for side, rows in sides.items()},
        "groups": {side: len({row.group for row in rows}) for side, rows in sides.items()},
    }
    if stratify_by:
        groups_of_label = Counter(labels.values())
        rows_of_label = {side: Counter(labels[row.group] for row in rows) for side, rows in sides.items()}
        report["labels"] = {
            label: {"groups": count, **{side: counts[label] for side, counts in rows_of_label.items()}}
            for label, count in sorted(groups_of_label.items())
        }
        report["labels_without_test_rows"] = sorted(
            label for label in groups_of_label if not rows_of_label["test"][label]
        )
    return report


def main() -> None:
    """Split the curated rows, prove the split, and write its sides."""
    everything = load_params()
    params, stratify_by = everything.split, everything.task.stratify_by
    task = read_task()
    rows = read_rows(artifacts("curate") / "rows.parquet")
    # A table with feedback only is split like any other.
    asked = exclude_feedback(rows) or rows
    feedback_rows = [number for number, row in enumerate(rows) if row.origin == "feedback"]
    feedback = pick(rows, feedback_rows) if len(asked) < len(rows) else []
    labels = choose_group_labels(asked, read_strata(asked, stratify_by, task))
    assigned = assign_sides(labels, params.validation_fraction, params.test_fraction, params.seed)
    sides, over_cap = divide_rows(asked, assigned, params.max_test_rows_per_group, params.seed)
    learned, rejected = select_feedback(feedback, assigned)
    capped, train_over_cap = cap_training_rows(
        sides.train, labels, params.max_train_rows_per_group, params.min_train_rows_per_label, params.seed
    )
    if train_over_cap:
        logger.info(
            "%d training rows rejected: at most %s of a group (split.max_train_rows_per_group)",
            train_over_cap,
            params.max_train_rows_per_group,
        )
    drawn = draw_training_rows(capped, labels, params.max_train_rows, params.seed)
    not_drawn = len(capped) - len(drawn)
    if not_drawn:
        logger.info("%d training rows not drawn: %s are wanted (split.max_train_rows)", not_drawn, len(drawn))
    shared = find_shared_parts(asked)
    links = find_shared_exchanges(asked)
    if feedback:
        links |= find_shared_exchanges(rows)
    sides, learned, known = remove_known_answers(Sides(drawn, sides.validation, sides.test), learned, links)
    train = shuffle_together(sides.train, learned, params.seed)
    sides, removed = remove_near_duplicates(
        Sides(train, sides.validation, sides.test), params.near_duplicate_threshold, shared
    )
    bad, telling = clear_refused(
        read_rows(artifacts("curate") / "refused.parquet"),
        assigned,
        sides,
        params.near_duplicate_threshold,
        shared,
    )
    if feedback:
        labels = choose_group_labels(rows, read_strata(rows, stratify_by, task)) | labels
    check_sizes(
        sides,
        {
            **{
                f"{reason} ({stage})": count
                for stage, counts in read_rejected_counts().items()
                for reason, count in counts.items()
            },
            "near duplicates of held-out prompts (split.near_duplicate_threshold)": removed,
            "answers in earlier turns (split)": known,
            "test rows over the limit of a group (split.max_test_rows_per_group)": over_cap,
            "training rows over the limit of a group (split.max_train_rows_per_group)": train_over_cap,
            "training rows that were not drawn (split.max_train_rows)": not_drawn,
            "feedback rows of held-out groups (split)": rejected,
        },
        len(rows),
        len(labels),
        choose_min_train_rows(params.min_train_rows, len(set(labels.values()) - {""})),
        choose_min_test_rows(params.min_test_rows),
        params.max_train_rows,
    )
    report = {
        "rows_in": len(rows),
        "feedback_rows": len(feedback),
        "feedback_rows_of_held_out_groups": rejected,
        "test_rows_over_cap": over_cap,
        "train_rows_over_cap": train_over_cap,
        "train_rows_not_drawn": not_drawn,
        "rows_removed_as_known_answers": known,
        "train_rows_removed_as_near_duplicates": removed,
        "rows_with_rejected_answer": {
            side: sum(row.rejected is not None for row in chosen) for side, chosen in sides.items()
        },
        "refused_answers": len(bad),
        "refused_answers_of_held_out_prompts": telling,
        **count_sides(sides, labels, stratify_by),
        "proof": prove_split(sides, params.near_duplicate_threshold, shared, links),
    }
    test = spool(unroll(sides.test, everything.task.turns), count_chars)
    report["test_answers"] = len(test)
    for side, chosen in (("train", sides.train), ("validation", sides.validation), ("test", test)):
        write_rows(artifacts("split") / f"{side}.parquet", chosen)
    write_rows(artifacts("split") / "refused.parquet", bad)
    write_json(reports("split") / "metrics.json", report)
    logger.info(
        "%s rows in %s groups (train, validation, test); %d near duplicates of held-out rows removed",
        list(report["rows"].values()),
        list(report["groups"].values()),
        removed,
    )


if __name__ == "__main__":
    run_stage(main)
