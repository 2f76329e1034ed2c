"""The rules over all rows: contradictions and duplicates. Each returns the numbers of the rejected rows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

from stages.common.logs import get_logger, show_progress
from stages.common.records import Row, format_canonical_json
from stages.common.similarity.compared_text import find_shared_parts, fold_spelling
from stages.common.similarity.near_duplicates import SimilarTexts
from stages.common.task.protocol import Task
from stages.curate.rules import Rejection

logger = get_logger("curate")

ROWS_A_STEP = 1000  # of progress

TableRule = Callable[[Sequence[Row]], dict[int, Rejection]]


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


def number_copies(rows: Sequence[Row]) -> list[Row]:
    """Return the rows, the second and later of equal ones with an id of their own: `<id>-2`, `<id>-3`.

    Stages tell rows apart by their ids. The group stays: copies without one stay together in the split, which
    removes those of other groups that would be learned and asked.
    """
    seen: Counter[str] = Counter()
    numbered = []
    for row in rows:
        seen[row.id] += 1
        numbered.append(row if seen[row.id] == 1 else replace(row, id=f"{row.id}-{seen[row.id]}"))
    return numbered


def find_near_duplicates(threshold: float, task: Task) -> TableRule:
    """Return the rule that rejects near duplicates of an earlier prompt with the same answer.

    What many prompts share does not count. Rows that are equal are `find_exact_duplicates`' concern.
    """

    def rule(rows: Sequence[Row]) -> dict[int, Rejection]:
        shared = find_shared_parts([row for row in rows if row.origin != "feedback"] or rows)
        by_answer: dict[str, list[int]] = defaultdict(list)
        for number, row in enumerate(rows):
            by_answer[task.canonical(row.answer)].append(number)
        rejected = {}
        done = 0
        for numbers in by_answer.values():
            if len(numbers) == 1:
                continue
            index = SimilarTexts(threshold, (shared.read(rows[number]) for number in numbers))
            kept: list[int] = []
            kept_ids: set[str] = set()
            for number in numbers:
                if rows[number].id in kept_ids:
                    continue
                near = index.find_or_add(shared.read(rows[number]))
                if near is None:
                    kept.append(number)
                    kept_ids.add(rows[number].id)
                else:
                    earlier, score = near
                    rejected[number] = Rejection(
                        "near_duplicate", f"{score:.3f} like {rows[kept[earlier]].id}"
                    )
                done += 1
                if done % ROWS_A_STEP == 0:
                    show_progress(logger, done, len(rows), "near duplicates")
        return rejected

    return rule


def _prompt_key(row: Row) -> str:
    return format_canonical_json([[message.role, fold_spelling(message.content)] for message in row.prompt])
