"""The rules over all rows: contradictions and duplicates. Each returns the numbers of the rejected rows."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from stages.common.logs import ROWS_A_STEP, get_logger, show_progress
from stages.common.messages import Message
from stages.common.records import Row, exclude_feedback, format_canonical_json, make_row
from stages.common.similarity.compared_text import find_shared_parts, fold_spelling
from stages.common.similarity.near_duplicates import find_near_earlier
from stages.common.task.protocol import Task
from stages.curate.rules import Rejection

logger = get_logger("curate")

TableRule = Callable[[Sequence[Row]], dict[int, Rejection]]


def find_contradicting_feedback(task: Task) -> TableRule:
    """Return the rule that rejects feedback whose prompt has another answer in other rows.

    Here and in `find_conflicting_answers`: where none of the answers excludes others, none is rejected.
    """

    def rule(rows: Sequence[Row]) -> dict[int, Rejection]:
        asked = {_hash_prompt(row) for row in rows if row.origin == "feedback"}
        if not asked:
            return {}
        answers: dict[bytes, dict[str, bool]] = defaultdict(dict)
        for row in rows:
            if row.origin != "feedback" and (prompt := _hash_prompt(row)) in asked:
                answers[prompt][task.canonical(row.answer)] = task.has_one_answer(row.answer)

        def contradicts(row: Row) -> bool:
            same = task.canonical(row.answer)
            others = [one for text, one in answers.get(_hash_prompt(row), {}).items() if text != same]
            return bool(others) and (any(others) or task.has_one_answer(row.answer))

        return {
            number: Rejection("contradicting_feedback", "other rows have another answer to this prompt")
            for number, row in enumerate(rows)
            if row.origin == "feedback" and contradicts(row)
        }

    return rule


def find_conflicting_answers(task: Task) -> TableRule:
    """Return the rule that rejects all rows of a prompt with several answers: any of them may be wrong."""

    def rule(rows: Sequence[Row]) -> dict[int, Rejection]:
        if not any(task.has_one_answer(row.answer) for row in rows):
            return {}
        by_prompt: dict[bytes, list[int]] = defaultdict(list)
        for number, row in enumerate(rows):
            by_prompt[_hash_prompt(row)].append(number)
        rejected: dict[int, Rejection] = {}
        for numbers in by_prompt.values():
            if len(numbers) == 1:
                continue
            texts = [rows[number].answer for number in numbers]
            different = len(set(map(task.canonical, texts)))
            if different > 1 and any(map(task.has_one_answer, texts)):
                rejection = Rejection("conflicting_answer", f"{different} different answers to one prompt")
                rejected |= dict.fromkeys(numbers, rejection)
        return rejected

    return rule


def find_exact_duplicates(rows: Sequence[Row]) -> dict[int, Rejection]:
    """Reject all but the first of the rows with the same messages and tools, but for the ids of calls."""
    seen: dict[str, str] = {}
    rejected = {}
    for number, row in enumerate(rows):
        content = _identify(row)
        if content in seen:
            rejected[number] = Rejection("exact_duplicate", f"of {seen[content]}")
        else:
            seen[content] = row.id
    return rejected


def _identify(row: Row) -> str:
    """Return the id that a row has without the ids of its calls, which are random in most logs."""
    turns = (*row.messages, row.rejected) if row.rejected else row.messages
    if not any(call.id for message in turns for call in message.tool_calls):
        return row.id
    messages = [_without_ids(message) for message in row.messages]
    rejected = _without_ids(row.rejected) if row.rejected else None
    return make_row(messages, row.source, row.license, tools=row.tools, rejected=rejected).id


def _without_ids(message: Message) -> Message:
    calls = tuple(replace(call, id=None) for call in message.tool_calls)
    return replace(message, tool_calls=calls, tool_call_id=None)


def find_confirmed_answers(rows: Sequence[Row], task: Task) -> TableRule:
    """Return the rule that rejects a refused answer that one of `rows` has as the right one of its prompt."""

    def rule(refused: Sequence[Row]) -> dict[int, Rejection]:
        asked = {_hash_prompt(row) for row in refused}
        right = {
            (prompt, task.canonical(row.answer)) for row in rows if (prompt := _hash_prompt(row)) in asked
        }
        return {
            number: Rejection("contradicting_rating", "another row has this answer as the right one")
            for number, row in enumerate(refused)
            if (_hash_prompt(row), task.canonical(row.answer)) in right
        }

    return rule


def number_copies(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the rows, the second and later of equal ones with an id of their own: `<id>-2`, `<id>-3`.

    Stages tell rows apart by their ids. The group stays: copies without one stay together in the split, which
    removes those of other groups that would be learned and asked.
    """
    seen: Counter[str] = Counter()
    for row in rows:
        seen[row.id] += 1
        yield row if seen[row.id] == 1 else replace(row, id=f"{row.id}-{seen[row.id]}")


def find_near_duplicates(threshold: float, task: Task) -> TableRule:
    """Return the rule that rejects near duplicates of an earlier prompt with the same answer and tools.

    What many prompts share does not count. Rows that are equal are `find_exact_duplicates`' concern.
    """

    def rule(rows: Sequence[Row]) -> dict[int, Rejection]:
        shared = find_shared_parts(exclude_feedback(rows) or rows)
        by_answer: dict[bytes, list[int]] = defaultdict(list)
        first: dict[str, int] = {}
        ids, copies_of = [], []
        for number, row in enumerate(rows):
            ids.append(row.id)
            content = _identify(row)
            copies_of.append(content)
            if first.setdefault(content, number) == number:
                worse = [task.canonical(row.rejected.answer)] if row.rejected else []
                parts = (task.canonical(row.answer), *(tool.text for tool in row.tools), *worse)
                answered = "\n".join(parts)
                by_answer[_hash_text(answered)].append(number)
        rejected: dict[int, Rejection] = {}
        done = 0
        for numbers in by_answer.values():
            kept: list[int] = []
            texts = (shared.read(rows[number]) for number in numbers)
            near_ones = find_near_earlier(texts, threshold) if len(numbers) > 1 else [None]
            for number, near in zip(numbers, near_ones, strict=True):
                if near is None:
                    kept.append(number)
                else:
                    earlier, score = near
                    rejected[number] = Rejection("near_duplicate", f"{score:.3f} like {ids[kept[earlier]]}")
                done += 1
                if done % ROWS_A_STEP == 0:
                    show_progress(logger, done, len(rows), "near duplicates")
        copies = {n: first[content] for n, content in enumerate(copies_of) if first[content] in rejected}
        return {number: rejected[original] for number, original in copies.items()}

    return rule


def _hash_prompt(row: Row) -> bytes:
    """Return a hash of the prompt in one spelling: as texts, the prompts would be in memory once more."""
    folded: list[list[str]] = [[message.role, fold_spelling(message.answer)] for message in row.prompt]
    return _hash_text(format_canonical_json([*folded, *([tool.text] for tool in row.tools)]))


def _hash_text(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=16).digest()
