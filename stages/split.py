"""Split: hold out whole groups for validation and test, and prove that no training row is like them.

In: `artifacts/curate/rows.parquet`.
Out: `artifacts/split/{train,validation,test}.parquet`; `reports/split/metrics.json` with the
counts and the proof: no group on two sides, and no training prompt nearly that of a held-out row.
Run: `python -m stages.split`

A group is rows that belong together (the sentences of one template); a row without a group is its own group.
Feedback from production is used only for training: validation and test rows are the same without it, so that
models are compared on the same questions.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stages.common.artifacts import artifacts, reports, write_json
from stages.common.errors import InputError
from stages.common.logs import get_logger, run_stage
from stages.common.near_duplicates import SimilarTexts, find_closest, join_prompt
from stages.common.params.loading import load_params
from stages.common.records import Row, read_rows, write_rows
from stages.common.sizes import choose_min_test_rows, choose_min_train_rows
from stages.common.task.kinds import read_task
from stages.common.task.protocol import Task
from stages.common.task.settings import CLASS

logger = get_logger("split")

MAX_PAIRS_COMPARED = 50_000_000  # about six seconds

Side = Literal["train", "validation", "test"]


@dataclass(frozen=True, slots=True)
class Sides:
    """The rows of each side."""

    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]

    def items(self) -> tuple[tuple[str, tuple[Row, ...]], ...]:
        """Return each side with its name."""
        return ("train", self.train), ("validation", self.validation), ("test", self.test)


def read_strata(rows: Sequence[Row], stratify_by: str | None, task: Task) -> list[str]:
    """Return the stratum of each row: its answer's class, its value of a tag, or "" for all.

    Raises:
        InputError: no row has the tag.
    """
    if stratify_by is None:
        return [""] * len(rows)
    if stratify_by == CLASS:
        return [task.read_class(row.answer) or "" for row in rows]
    if not any(stratify_by in row.tags for row in rows):
        have = sorted({tag for row in rows for tag in row.tags})
        raise InputError(
            f"task.stratify_by: no row has the tag {stratify_by!r} (tags: {', '.join(have) or 'none'})",
            "name one of them, set stratify_by: label for the class of the answers, or null",
        )
    return [row.tags.get(stratify_by, "") for row in rows]


def choose_group_labels(rows: Sequence[Row], strata: Sequence[str]) -> dict[str, str]:
    """Return the stratum of each group: the most common one of its rows."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row, stratum in zip(rows, strata, strict=True):
        counts[row.group][stratum] += 1
    return {group: min(c, key=lambda label: (-c[label], label)) for group, c in counts.items()}


def assign_sides(
    labels: Mapping[str, str], validation_fraction: float, test_fraction: float, seed: int
) -> dict[str, Side]:
    """Assign each group to a side, label by label, so that all labels have the same share of each side.

    The share of a small label may be less than a group; the remainder is carried over to the next label, so
    that the total shares are right. A label always keeps a group in training.
    """
    groups_of: dict[str, list[str]] = defaultdict(list)
    for group, label in labels.items():
        groups_of[label].append(group)
    order = sorted(groups_of)
    random.Random(f"{seed}/labels").shuffle(order)
    sides: dict[str, Side] = dict.fromkeys(labels, "train")
    shares: dict[Side, float] = {"test": test_fraction, "validation": validation_fraction}
    owed = dict.fromkeys(shares, 0.0)
    for label in order:
        groups = sorted(groups_of[label])
        random.Random(f"{seed}/{label}").shuffle(groups)
        spare = len(groups) - 1
        for side, fraction in shares.items():
            owed[side] += fraction * len(groups_of[label])
            taken = min(spare, max(0, int(owed[side] + 0.5)))
            for _ in range(taken):
                sides[groups.pop()] = side
            spare -= taken
            owed[side] -= taken
    return sides


def divide_rows(
    rows: Sequence[Row], sides: Mapping[str, Side], max_test_rows_per_group: int, seed: int
) -> tuple[Sides, int]:
    """Return the rows of each side, and how many test rows are over the limit of a group."""
    by_side: dict[Side, list[Row]] = {"train": [], "validation": [], "test": []}
    tests: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        side = sides[row.group]
        if side == "test":
            tests[row.group].append(row)
        else:
            by_side[side].append(row)
    rejected = 0
    for group, members in tests.items():
        chosen = random.Random(f"{seed}/{group}").sample(members, min(len(members), max_test_rows_per_group))
        rejected += len(members) - len(chosen)
        by_side["test"] += sorted(chosen, key=lambda row: row.id)
    # Adjacent rows are of one group; training needs them in random order.
    random.Random(f"{seed}/train").shuffle(by_side["train"])
    return Sides(tuple(by_side["train"]), tuple(by_side["validation"]), tuple(by_side["test"])), rejected


def cap_training_rows(
    rows: Sequence[Row],
    labels: Mapping[str, str],
    max_rows_per_group: int | None,
    min_rows_per_label: int,
    seed: int,
) -> tuple[tuple[Row, ...], int]:
    """Return the training rows with at most `max_rows_per_group` of each group, and how many exceed it.

    Groups of a rare label keep more, so that the label keeps `min_rows_per_label` rows if it has them: more
    rows of a phrasing improve little, more rows of a rare class a lot (docs/benchmarks.md).

    Args:
        labels: of the groups.
        max_rows_per_group: None for all rows.
    """
    if max_rows_per_group is None:
        return tuple(rows), 0
    by_group: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_group[row.group].append(row)
    groups_of_label = Counter(labels[group] for group in by_group)
    kept: set[str] = set()
    for group, members in by_group.items():
        limit = max(max_rows_per_group, math.ceil(min_rows_per_label / groups_of_label[labels[group]]))
        chosen = random.Random(f"{seed}/{group}/train").sample(members, min(len(members), limit))
        kept |= {row.id for row in chosen}
    chosen_rows = tuple(row for row in rows if row.id in kept)
    return chosen_rows, len(rows) - len(chosen_rows)


def select_feedback(rows: Sequence[Row], sides: Mapping[str, Side]) -> tuple[tuple[Row, ...], int]:
    """Return the feedback rows for training, and how many are rejected because their group is held out."""
    free = tuple(row for row in rows if sides.get(row.group, "train") == "train")
    return free, len(rows) - len(free)


def shuffle_together(train: Sequence[Row], more: Sequence[Row], seed: int) -> tuple[Row, ...]:
    """Return both in one random order; without `more`, `train` unchanged."""
    if not more:
        return tuple(train)
    both = [*train, *more]
    random.Random(f"{seed}/feedback").shuffle(both)
    return tuple(both)


def remove_near_duplicates(sides: Sides, threshold: float) -> tuple[Sides, int]:
    """Remove the training rows with a near duplicate in validation or test; return how many."""
    near = find_near_training_rows(sides, threshold)
    train = tuple(row for number, row in enumerate(sides.train) if number not in near)
    return Sides(train, sides.validation, sides.test), len(near)


def find_near_training_rows(sides: Sides, threshold: float) -> set[int]:
    """Return the numbers of the training rows with a near duplicate among the held-out rows."""
    held_out = [join_prompt(row) for row in (*sides.validation, *sides.test)]
    train = [join_prompt(row) for row in sides.train]
    index = SimilarTexts(threshold, [*train, *held_out])
    for text in held_out:
        index.add(text)
    return {number for number, text in enumerate(train) if any(True for _ in index.find_near(text))}


def prove_split(sides: Sides, threshold: float) -> dict[str, Any]:
    """Check that no group is on two sides and no near duplicate across them; return the measurements.

    Pairs are compared directly, without the index of `remove_near_duplicates`, so that one checks the other:
    all pairs up to `MAX_PAIRS_COMPARED`, above that the pairs of every n-th held-out row.

    Raises:
        AssertionError: a group or a near duplicate is on two sides, which is a bug.
    """
    on_sides = Counter(group for _, rows in sides.items() for group in {row.group for row in rows})
    shared = sum(count > 1 for count in on_sides.values())
    held_out = [join_prompt(row) for row in (*sides.validation, *sides.test)]
    train = [join_prompt(row) for row in sides.train]
    step = max(1, math.ceil(len(held_out) * len(train) / MAX_PAIRS_COMPARED))
    measured = held_out[::step]
    nearest = find_closest(measured, train)
    found = {
        "groups_on_two_sides": shared,
        "pairs_searched": len(held_out) * len(train),
        "pairs_compared": len(measured) * len(train),
        "highest_similarity": round(nearest[2], 6) if nearest else 0.0,
        "closest_pair": [measured[nearest[0]], train[nearest[1]]] if nearest else [],
        "near_duplicate_threshold": threshold,
        "near_duplicates_across": int(nearest is not None and nearest[2] >= threshold),
    }
    if shared or found["near_duplicates_across"]:
        raise AssertionError(f"the split is not clean: {found}")
    return found


def check_sizes(sides: Sides, rows_in: int, groups_in: int, min_train_rows: int, min_test_rows: int) -> None:
    """Check that the split is large enough to train and to evaluate.

    Raises:
        InputError: with the numbers of both sides.
    """
    problems = [
        f"{side}: {len(rows)} rows, and {least} are required (split.min_{side}_rows)"
        for side, rows, least in (("train", sides.train, min_train_rows), ("test", sides.test, min_test_rows))
        if len(rows) < least
    ]
    if problems:
        raise InputError(
            f"the split of {rows_in} rows in {groups_in} groups is too small\n" + "\n".join(problems),
            "collect more rows or more groups (for the packaged default: collect.sources rows_per_template), "
            "raise split.test_fraction or split.max_test_rows_per_group, or set split.min_train_rows, "
            "split.min_test_rows and evaluate.min_test_rows to lower numbers",
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
    asked = [row for row in rows if row.origin != "feedback"] or rows
    feedback = [row for row in rows if row.origin == "feedback"] if len(asked) < len(rows) else []
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
    train = shuffle_together(capped, learned, params.seed)
    sides, removed = remove_near_duplicates(
        Sides(train, sides.validation, sides.test), params.near_duplicate_threshold
    )
    labels = choose_group_labels(rows, read_strata(rows, stratify_by, task)) | labels
    check_sizes(
        sides,
        len(rows),
        len(labels),
        choose_min_train_rows(params.min_train_rows, len(set(labels.values()) - {""})),
        choose_min_test_rows(params.min_test_rows),
    )
    report = {
        "rows_in": len(rows),
        "feedback_rows": len(feedback),
        "feedback_rows_of_held_out_groups": rejected,
        "test_rows_over_cap": over_cap,
        "train_rows_over_cap": train_over_cap,
        "train_rows_removed_as_near_duplicates": removed,
        **count_sides(sides, labels, stratify_by),
        "proof": prove_split(sides, params.near_duplicate_threshold),
    }
    for side, chosen in sides.items():
        write_rows(artifacts("split") / f"{side}.parquet", chosen)
    write_json(reports("split") / "metrics.json", report)
    logger.info(
        "%s rows in %s groups (train, validation, test); %d near duplicates of held-out rows removed",
        list(report["rows"].values()),
        list(report["groups"].values()),
        removed,
    )


if __name__ == "__main__":
    run_stage(main)
