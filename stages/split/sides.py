"""Assign rows to train, validation and test: whole groups, label by label."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Literal

from stages.common.chat.row_class import read_row_class
from stages.common.errors import InputError
from stages.common.records import Row
from stages.common.spool import join, pick
from stages.common.task.protocol import Task
from stages.common.task.settings import CLASS

Side = Literal["train", "validation", "test"]


@dataclass(frozen=True, slots=True)
class Sides:
    """The rows of each side."""

    train: Sequence[Row]
    validation: Sequence[Row]
    test: Sequence[Row]

    def items(self) -> tuple[tuple[str, Sequence[Row]], ...]:
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
        return [read_row_class(row, task) or "" for row in rows]
    strata = [row.tags.get(stratify_by) for row in rows]
    if all(stratum is None for stratum in strata):
        have = sorted({tag for row in rows for tag in row.tags})
        raise InputError(
            f"task.stratify_by: no row has the tag {stratify_by!r} (tags: {', '.join(have) or 'none'})",
            "name one of them, set stratify_by: label for the class of the answers, or null",
        )
    return [stratum or "" for stratum in strata]


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
    by_side: dict[Side, list[int]] = {"train": [], "validation": [], "test": []}
    tests: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for number, row in enumerate(rows):
        side = sides[row.group]
        if side == "test":
            tests[row.group].append((row.id, number))
        else:
            by_side[side].append(number)
    rejected = 0
    for group, members in tests.items():
        chosen = random.Random(f"{seed}/{group}").sample(members, min(len(members), max_test_rows_per_group))
        rejected += len(members) - len(chosen)
        by_side["test"] += [number for _, number in sorted(chosen, key=itemgetter(0))]
    # Adjacent rows are of one group; training needs them in random order.
    random.Random(f"{seed}/train").shuffle(by_side["train"])
    return Sides(*(pick(rows, by_side[side]) for side in ("train", "validation", "test"))), rejected


def cap_training_rows(
    rows: Sequence[Row],
    labels: Mapping[str, str],
    max_rows_per_group: int | None,
    min_rows_per_label: int,
    seed: int,
) -> tuple[Sequence[Row], int]:
    """Return the training rows with at most `max_rows_per_group` of each group, and how many exceed it.

    Groups of a rare label keep more, so that the label keeps `min_rows_per_label` rows if it has them: more
    rows of a phrasing improve little, more rows of a rare class a lot (docs/benchmarks.md).

    Args:
        labels: of the groups.
        max_rows_per_group: None for all rows.
    """
    if max_rows_per_group is None:
        return rows, 0
    by_group: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for number, row in enumerate(rows):
        by_group[row.group].append((row.id, number))
    groups_of_label = Counter(labels[group] for group in by_group)
    kept: set[str] = set()
    for group, members in by_group.items():
        limit = max(max_rows_per_group, math.ceil(min_rows_per_label / groups_of_label[labels[group]]))
        chosen = random.Random(f"{seed}/{group}/train").sample(members, min(len(members), limit))
        kept |= {row_id for row_id, _ in chosen}
    numbers = sorted(number for members in by_group.values() for row_id, number in members if row_id in kept)
    return pick(rows, numbers), len(rows) - len(numbers)


def draw_training_rows(
    rows: Sequence[Row], labels: Mapping[str, str], max_rows: int | None, seed: int
) -> Sequence[Row]:
    """Return at most `max_rows` of the training rows: one of each label if it can be, else its share.

    Args:
        labels: of the groups.
        max_rows: None for all rows.
    """
    if max_rows is None or len(rows) <= max_rows:
        return rows
    by_label: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        by_label[labels[row.group]].append(number)
    shares = {label: len(numbers) * max_rows / len(rows) for label, numbers in by_label.items()}
    quotas = {label: math.floor(share) for label, share in shares.items()}
    largest_rests = sorted(shares, key=lambda label: (quotas[label] - shares[label], label))
    for label in largest_rests[: max_rows - sum(quotas.values())]:
        quotas[label] += 1
    for label in [label for label, quota in quotas.items() if not quota]:
        largest = max(quotas, key=lambda other: quotas[other])
        if quotas[largest] > 1:  # a class without a row could not be learned
            quotas[largest] -= 1
            quotas[label] = 1
    drawn = (
        random.Random(f"{seed}/{label}/draw").sample(numbers, quotas[label])
        for label, numbers in sorted(by_label.items())
    )
    return pick(rows, sorted(number for numbers in drawn for number in numbers))


def select_feedback(rows: Sequence[Row], sides: Mapping[str, Side]) -> tuple[Sequence[Row], int]:
    """Return the feedback rows for training, and how many are rejected because their group is held out."""
    free = [number for number, row in enumerate(rows) if sides.get(row.group, "train") == "train"]
    return pick(rows, free), len(rows) - len(free)


def shuffle_together(train: Sequence[Row], more: Sequence[Row], seed: int) -> Sequence[Row]:
    """Return both in one random order; without `more`, `train` unchanged."""
    if not more:
        return train
    order = list(range(len(train) + len(more)))
    random.Random(f"{seed}/feedback").shuffle(order)
    return pick(join(train, more), order)
