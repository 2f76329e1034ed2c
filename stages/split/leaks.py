"""Leaks: find training rows that nearly equal test rows, remove them, and prove that none is left."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from itertools import chain
from typing import Any

from stages.common.chat.conversations import (
    Exchange,
    find_known_answers,
    find_rows_that_answer,
    list_exchanges,
)
from stages.common.logs import ROWS_A_STEP, get_logger, show_progress
from stages.common.records import Row
from stages.common.similarity.compared_text import SharedParts
from stages.common.similarity.grams import extract_grams
from stages.common.similarity.near_duplicates import SimilarTexts, find_closest, spool_grams
from stages.common.spool import exclude, join
from stages.split.sides import Side, Sides, select_feedback

logger = get_logger("split")

MAX_PAIRS_COMPARED = 50_000_000  # about six seconds
MAX_GRAMS_COMPARED = (
    4_000_000_000  # characters of the training prompts, for each held-out one: of long prompts
)


def remove_known_answers(
    sides: Sides, feedback: Sequence[Row], links: Set[Exchange]
) -> tuple[Sides, Sequence[Row], int]:
    """Remove the held-out rows of which question and answer are earlier turns of a training row.

    Whole conversations are on one side, but an exchange that many conversations have may also be a row.

    Args:
        links: the exchanges that make rows parts of one conversation.

    Returns:
        The sides, the feedback without rows of a held-out conversation, and how many rows were removed in
        all. Feedback removes no held-out row.
    """
    known = find_known_answers(sides.validation, sides.train), find_known_answers(sides.test, sides.train)
    validation, test = exclude(sides.validation, known[0]), exclude(sides.test, known[1])
    held_out = join(validation, test)
    asked = links & {exchange for row in held_out for exchange in list_exchanges(row)} if links else set()
    telling = find_rows_that_answer(feedback, held_out) | {
        number for number, row in enumerate(feedback) if asked and asked & set(list_exchanges(row))
    }
    left = exclude(feedback, telling)
    return Sides(sides.train, validation, test), left, sum(map(len, known)) + len(telling)


def remove_near_duplicates(sides: Sides, threshold: float, shared: SharedParts) -> tuple[Sides, int]:
    """Remove the training rows with a near duplicate in validation or test; return how many.

    Args:
        shared: what many prompts have in common, which does not count.
    """
    near = find_near_training_rows(sides, threshold, shared)
    return Sides(exclude(sides.train, near), sides.validation, sides.test), len(near)


def clear_refused(
    refused: Sequence[Row], assigned: Mapping[str, Side], sides: Sides, threshold: float, shared: SharedParts
) -> tuple[Sequence[Row], int]:
    """Return the rows with a refused answer that tell nothing about held-out rows, and how many do.

    Args:
        assigned: the side of each group.
    """
    if not refused:
        return refused, 0
    free, of_held_out = select_feedback(refused, assigned)
    telling = find_rows_that_answer(free, join(sides.validation, sides.test))
    asked = Sides(exclude(free, telling), sides.validation, sides.test)
    left, near = remove_near_duplicates(asked, threshold, shared)
    return left.train, of_held_out + len(telling) + near


def find_near_training_rows(sides: Sides, threshold: float, shared: SharedParts) -> set[int]:
    """Return the numbers of the training rows with a near duplicate among the held-out rows."""
    held_out = spool_grams(map(shared.read, chain(sides.validation, sides.test)))
    index = SimilarTexts(threshold, held_out)
    for grams in held_out:
        index.add(grams)
    found = set()
    for number, row in enumerate(sides.train):
        if any(True for _ in index.find_near(extract_grams(shared.read(row)))):
            found.add(number)
        if (number + 1) % ROWS_A_STEP == 0:
            show_progress(logger, number + 1, len(sides.train), "near duplicates")
    return found


def prove_split(sides: Sides, threshold: float, shared: SharedParts, links: Set[Exchange]) -> dict[str, Any]:
    """Check that nothing that is asked was learned; return the measurements.

    No group is on two sides, no conversation, and no near duplicate across them. Pairs are compared directly,
    without the index of `remove_near_duplicates`, so that one checks the other: all pairs up to
    `MAX_PAIRS_COMPARED` and `MAX_GRAMS_COMPARED`, above that the pairs of every n-th held-out row.

    Raises:
        AssertionError: one of these is on two sides, which is a bug.
    """
    on_sides = Counter(group for _, rows in sides.items() for group in {row.group for row in rows})
    groups = sum(count > 1 for count in on_sides.values())
    held_out = join(sides.validation, sides.test)
    pairs = len(held_out) * len(sides.train)
    chars = sum(len(message.content) for row in sides.train for message in row.prompt)
    step = max(
        1, math.ceil(pairs / MAX_PAIRS_COMPARED), math.ceil(len(held_out) * chars / MAX_GRAMS_COMPARED)
    )
    measured = [shared.read(row) for row in held_out[::step]]
    nearest = find_closest(measured, (shared.read(row) for row in sides.train))
    found = {
        "groups_on_two_sides": groups,
        "conversations_on_two_sides": count_shared_conversations(sides, links),
        "pairs_searched": pairs,
        "pairs_compared": len(measured) * len(sides.train),
        "highest_similarity": round(nearest[2], 6) if nearest else 0.0,
        "closest_pair": [measured[nearest[0]], shared.read(sides.train[nearest[1]])] if nearest else [],
        "near_duplicate_threshold": threshold,
        "near_duplicates_across": int(nearest is not None and nearest[2] >= threshold),
    }
    if groups or found["conversations_on_two_sides"] or found["near_duplicates_across"]:
        raise AssertionError(f"the split is not clean: {found}")
    return found


def count_shared_conversations(sides: Sides, links: Set[Exchange]) -> int:
    """Return how many exchanges of one conversation are in training and in a held-out row."""
    held_out = join(sides.validation, sides.test)
    if not links:
        return 0
    learned, asked = ({e for row in rows for e in list_exchanges(row)} for rows in (sides.train, held_out))
    return len(learned & asked & links)
