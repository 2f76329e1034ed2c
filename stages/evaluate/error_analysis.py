"""What the tuned model gets wrong: the answers, worst first, and the labels it takes for each other."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stages.common.markdown import code
from stages.common.metrics import json_faults, read_json_answer, score_text
from stages.common.records import Row

# What is wrong with an answer, worst first.
FAULTS = (
    "invalid",
    "wrong label",
    "missing slot",
    "wrong value",
    "extra slot",
    "wrong answer",
    "other words",
)

INVALID_LABEL = "(invalid)"


@dataclass(frozen=True, slots=True)
class Mistake:
    """A row that the tuned model answers wrongly."""

    id: str
    question: str
    expected: str
    base: str
    tuned: str
    kind: str
    differs: str
    base_was_right: bool


@dataclass(frozen=True, slots=True)
class Given:
    """One model's answer to a row, whether it is right, and how unlikely it found the reference (nats)."""

    text: str
    right: bool
    reference_loss: float


def mistakes(
    rows: Sequence[Row], base: Sequence[Given], tuned: Sequence[Given], task: str, label_key: str | None
) -> list[Mistake]:
    """Return the rows that the tuned model answers wrongly, worst first.

    The worst is an answer that cannot be used at all, then a wrong label, then the slots; of equals, the
    one whose right answer the model found least likely.
    """
    ranked: list[tuple[tuple[Any, ...], Mistake]] = []
    for row, before, after in zip(rows, base, tuned, strict=True):
        if after.right:
            continue
        faults, nearness = faults_of(row, after.text, task, label_key)
        kind = min(faults, key=FAULTS.index)
        mistake = Mistake(
            id=row.id,
            question=row.question,
            expected=row.answer,
            base=before.text,
            tuned=after.text,
            kind=kind,
            differs="; ".join(f"{name}: {text}" for name, text in faults.items()),
            base_was_right=before.right,
        )
        rank = (FAULTS.index(kind), nearness, -len(faults), -after.reference_loss, row.id)
        ranked.append((rank, mistake))
    return [mistake for _, mistake in sorted(ranked, key=lambda pair: pair[0])]


def faults_of(row: Row, text: str, task: str, label_key: str | None) -> tuple[dict[str, str], float]:
    """Return what differs from the reference by kind of fault, and how near the text comes to it."""
    if task == "text":
        nearness = float(score_text([text], [row.answer])["rouge_l"].by_row()[0])
        return {"other words": f"ROUGE-L {nearness:.2f}"}, nearness
    reference = read_json_answer(row.answer)
    if reference is None:
        raise ValueError(f"row {row.id}: the reference is not one JSON value")
    return json_faults(read_json_answer(text), reference, label_key), 0.0


def confusions(rows: Sequence[Row], answers: Sequence[str], label_key: str) -> list[tuple[str, str, int]]:
    """Return which label was given in place of which, and how often, most frequent first."""
    pairs: Counter[tuple[str, str]] = Counter()
    for row, answer in zip(rows, answers, strict=True):
        reference, given = read_json_answer(row.answer), read_json_answer(answer)
        expected = (reference and reference.label(label_key)) or INVALID_LABEL
        answered = (given and given.label(label_key)) or INVALID_LABEL
        if expected != answered:
            pairs[expected, answered] += 1
    return sorted(((e, a, n) for (e, a), n in pairs.items()), key=lambda p: (-p[2], p[0], p[1]))


def errors_csv(found: Sequence[Mistake]) -> str:
    """Return every mistake as CSV, worst first."""
    buffer = io.StringIO()
    columns = ["id", "question", "expected", "base", "tuned", "kind", "differs", "base_was_right"]
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(mistake) for mistake in found)
    return buffer.getvalue()


def errors_md(
    found: Sequence[Mistake], rows: int, pairs: Sequence[tuple[str, str, int]], shown: int, task: str
) -> str:
    """Return the worst mistakes as a page to read."""
    kinds = Counter(mistake.kind for mistake in found)
    broken = sum(mistake.base_was_right for mistake in found)
    lines = [
        "# The worst errors of the tuned model",
        "",
        f"{len(found)} of {rows} answers are not an exact match; the base model had {broken} of these right. "
        "All are in `errors.csv`.",
    ]
    if task == "json" and found:
        lines += ["", "| worst fault of the answer | rows |", "|---|---:|"]
        lines += [f"| {kind} | {kinds[kind]} |" for kind in FAULTS if kinds[kind]]
    if pairs:
        lines += [
            "",
            "## Labels mistaken for each other",
            "",
            "| expected | answered | rows |",
            "|---|---|---:|",
        ]
        lines += [f"| {code(e)} | {code(a)} | {n} |" for e, a, n in pairs[:shown]]
    if found:
        lines += ["", f"## The {min(shown, len(found))} worst answers", ""]
        lines += ["| question | expected | base | tuned | what differs |", "|---|---|---|---|---|"]
        lines += [
            "| " + " | ".join(map(code, (m.question, m.expected, m.base, m.tuned, m.differs))) + " |"
            for m in found[:shown]
        ]
    return "\n".join(lines) + "\n"
