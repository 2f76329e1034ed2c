"""What the tuned model gets wrong: the answers, worst first, and the classes that it confuses."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import takewhile
from typing import Any

from stages.common.chat.turns import TURN
from stages.common.escaping import escape_csv_cell, escape_markdown, format_code
from stages.common.records import Row
from stages.common.task.protocol import Task


@dataclass(frozen=True, slots=True)
class Prediction:
    """One model's answer to a row.

    Attributes:
        reference_loss: summed negative log-likelihood of the reference, in nats.
    """

    text: str
    right: bool
    reference_loss: float


@dataclass(frozen=True, slots=True)
class WrongAnswer:
    """A row that the tuned model answers wrongly.

    Attributes:
        turn: which question of a longer conversation it is; empty in one of a single question.
        result: what the tools returned that the answer is about; empty without calls before it.
    """

    id: str
    turn: str
    question: str
    result: str
    expected: str
    base: str
    tuned: str
    error_type: str
    differs: str
    base_was_right: bool


def list_errors(
    rows: Sequence[Row], base: Sequence[Prediction], tuned: Sequence[Prediction], task: Task
) -> list[WrongAnswer]:
    """Return the rows that the tuned model answers wrongly, worst first.

    The order is that of the task's error types, then how far the answer is from the reference, how many
    errors it has, and how unlikely the model found the right answer.
    """
    ranked: list[tuple[tuple[Any, ...], WrongAnswer]] = []
    for row, before, after in zip(rows, base, tuned, strict=True):
        if after.right:
            continue
        errors = task.find_errors(after.text, row.answer)
        worst = min(errors, key=task.error_types.index)
        wrong = WrongAnswer(
            id=row.id,
            turn=row.tags.get(TURN, ""),
            question=row.question,
            result=_read_result(row),
            expected=row.answer,
            base=before.text,
            tuned=after.text,
            error_type=worst,
            differs="; ".join(f"{name}: {text}" for name, text in errors.items()),
            base_was_right=before.right,
        )
        nearness = task.nearness(after.text, row.answer)
        rank = (task.error_types.index(worst), nearness, -len(errors), -after.reference_loss, row.id)
        ranked.append((rank, wrong))
    return [wrong for _, wrong in sorted(ranked, key=lambda pair: pair[0])]


def format_errors_csv(found: Iterable[WrongAnswer]) -> Iterator[str]:
    """Yield every wrong answer as CSV, worst first; what a spreadsheet would compute begins with a quote."""
    columns = [one.name for one in fields(WrongAnswer)]
    yield _format_csv(columns)
    for wrong in found:
        cells = asdict(wrong)
        values = [cells[name] for name in columns]
        yield _format_csv([escape_csv_cell(cell) if isinstance(cell, str) else cell for cell in values])


def _format_csv(cells: Sequence[Any]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()


def format_errors_page(
    found: Sequence[WrongAnswer], rows: int, confused: Sequence[tuple[str, str, int]], shown: int, task: Task
) -> str:
    """Return the worst answers as a page."""
    types = Counter(wrong.error_type for wrong in found)
    broken = sum(wrong.base_was_right for wrong in found)
    lines = [
        "# The worst errors of the tuned model",
        "",
        f"{len(found)} of {rows} answers are not an exact match; the base model had {broken} of these right. "
        "All are in `errors.csv`.",
    ]
    if found:
        lines += ["", "| worst error of the answer | rows |", "|---|---:|"]
        lines += [f"| {name} | {types[name]} |" for name in task.error_types if types[name]]
    if confused:
        lines += ["", "## Confused classes", "", "| expected | answered | rows |", "|---|---|---:|"]
        lines += [f"| {format_code(e)} | {format_code(a)} | {n} |" for e, a, n in confused[:shown]]
    if found:
        lines += ["", f"## The {min(shown, len(found))} worst answers", ""]
        lines += ["| question | expected | base | tuned | what differs |", "|---|---|---|---|---|"]
        for wrong in found[:shown]:
            answers = (task.format_answer(text) for text in (wrong.expected, wrong.base, wrong.tuned))
            cells = [_format_question(wrong), *map(format_code, answers), format_code(wrong.differs)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _read_result(row: Row) -> str:
    """Return the results of tools that come right before the answer."""
    results = takewhile(lambda message: message.role == "tool", reversed(row.prompt))
    return "; ".join(reversed([message.content for message in results]))


def _format_question(wrong: WrongAnswer) -> str:
    turn = f"turn {wrong.turn}: " if wrong.turn else ""
    result = f" → {format_code(wrong.result)}" if wrong.result else ""
    return f"{escape_markdown(turn)}{format_code(wrong.question)}{result}"
