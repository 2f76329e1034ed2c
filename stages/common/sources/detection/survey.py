"""Survey rows before training on them: size, classes, duplicates, personal data, oddities."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from stages.common.privacy.personal_data import RECOGNISERS, holds
from stages.common.records import Row
from stages.common.sources.detection.task_kind import TaskKind
from stages.common.sources.files.entries import shorten

SMALL_CLASS_ROWS = 3  # fewer cannot be in training, validation and test
NO_ANSWERS = frozenset({"n/a", "na", "nan", "none", "null", "todo", "tbd", "-", "?", "unknown", "#n/a"})
# UTF-8 read as cp1252: "ü" is "Ã¼", "’" is "â€™".
MOJIBAKE = re.compile(r"Ã[\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹Œ]|â€[™œ\x9d“”˜¦]|Â[\xa0-\xbf]")
MARKUP = re.compile(
    r"</?(?:br|p|div|span|a|b|i|li|ul|td|tr)\b[^>]*>|&(?:amp|lt|gt|quot|nbsp|#\d+);", re.IGNORECASE
)
PLACEHOLDERS = re.compile(r"\{\{\s*[\w.]+\s*\}\}|<(?:NAME|PERSON|EMAIL|PHONE)>")
CONTROL_TOKENS = re.compile(r"<\|[a-z_]+\|>|\[/?INST\]|<</?SYS>>|</?s>")


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, 95th percentile, largest and sum of a count over all rows."""

    median: int
    p95: int
    largest: int
    total: int


@dataclass(frozen=True, slots=True)
class Oddity:
    """Something unusual: what, in how many rows, and one example."""

    what: str
    rows: int
    example: str


@dataclass(frozen=True, slots=True)
class Survey:
    """The measurements of a set of rows.

    Attributes:
        classes: rows by class, the largest first; empty for a task without classes.
        duplicates: rows whose messages an earlier row has.
        conflicts: rows whose prompt another row answers differently.
        personal_data: rows by kind of personal data, secrets included.
        row_tokens: of prompt and answer together.
        long_rows: rows of more tokens than training takes.
    """

    rows: int
    question_chars: Spread
    answer_chars: Spread
    row_tokens: Spread
    answer_tokens: Spread
    classes: Mapping[str, int]
    duplicates: int
    conflicts: int
    personal_data: Mapping[str, int]
    long_rows: int
    oddities: tuple[Oddity, ...]


def survey_rows(
    rows: Sequence[Row], task: TaskKind, count_tokens: Callable[[str], int], max_row_tokens: int
) -> Survey:
    """Measure a set of rows; there must be one at least."""
    classes = Counter(label for row in rows if (label := read_class(row.answer, task)) is not None)
    answer_tokens = [count_tokens(row.answer) for row in rows]
    prompt_tokens = [sum(count_tokens(message.content) for message in row.prompt) for row in rows]
    row_tokens = [sum(tokens) for tokens in zip(prompt_tokens, answer_tokens, strict=True)]
    return Survey(
        rows=len(rows),
        question_chars=measure_spread([len(row.question) for row in rows]),
        answer_chars=measure_spread([len(row.answer) for row in rows]),
        row_tokens=measure_spread(row_tokens),
        answer_tokens=measure_spread(answer_tokens),
        classes=dict(classes.most_common()),
        duplicates=len(rows) - len({row.id for row in rows}),
        conflicts=count_conflicts(rows),
        personal_data=count_personal_data(rows),
        long_rows=sum(tokens > max_row_tokens for tokens in row_tokens),
        oddities=(*find_odd_texts(rows), *find_odd_classes(classes)),
    )


def read_class(answer: str, task: TaskKind) -> str | None:
    """Return the class of an answer, None for a task without classes or an answer without one."""
    if task.kind == "label":
        return answer.strip()
    if task.kind == "text" or task.label_key is None:
        return None
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    label = value.get(task.label_key) if isinstance(value, dict) else None
    return label if isinstance(label, str) else None


def measure_spread(counts: Sequence[int]) -> Spread:
    """Return the spread of counts, of which there is one at least."""
    ordered = sorted(counts)
    return Spread(
        median=ordered[len(ordered) // 2],
        p95=ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        largest=ordered[-1],
        total=sum(ordered),
    )


def count_conflicts(rows: Sequence[Row]) -> int:
    """Return how many rows have a prompt that occurs with another answer too."""
    answers: defaultdict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for row in rows:
        answers[tuple(message.content for message in row.prompt)][row.answer] += 1
    return sum(sum(by_answer.values()) for by_answer in answers.values() if len(by_answer) > 1)


def count_personal_data(rows: Sequence[Row]) -> dict[str, int]:
    """Return in how many rows each kind of personal data, or a secret, is; without the kinds in none."""
    found = Counter(
        kind
        for row in rows
        for kind in RECOGNISERS
        if any(holds(kind, message.content) for message in row.messages)
    )
    return dict(found.most_common())


def find_odd_texts(rows: Sequence[Row]) -> list[Oddity]:
    """Return what is unusual in questions and answers, each with its number of rows and an example."""
    found: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        text = f"{row.question}\n{row.answer}"
        for what, pattern in (
            ("text decoded with the wrong encoding", MOJIBAKE),
            ("HTML", MARKUP),
            ("control tokens of a chat template", CONTROL_TOKENS),
            ("placeholders that were not filled", PLACEHOLDERS),
        ):
            if match := pattern.search(text):
                found[what].append(text[max(0, match.start() - 20) : match.end() + 20])
        if "\ufffd" in text:
            found["replacement characters (\ufffd): characters are lost"].append(text)
        if row.answer.strip().casefold() in NO_ANSWERS:
            found["answers without content"].append(row.answer)
        if row.answer.strip() == row.question.strip():
            found["answers that repeat the question"].append(row.answer)
    return [Oddity(what, len(texts), shorten(texts[0])) for what, texts in found.items()]


def find_odd_classes(classes: Mapping[str, int]) -> list[Oddity]:
    """Return classes that differ only in case or space, and classes with too few rows to learn and test."""
    spellings: defaultdict[str, list[str]] = defaultdict(list)
    for name in classes:
        spellings[re.sub(r"[\s_-]+", " ", name.strip().casefold())].append(name)
    alike = [names for names in spellings.values() if len(names) > 1]
    small = [name for name, rows in classes.items() if rows < SMALL_CLASS_ROWS]
    found = []
    if alike:
        rows = sum(classes[name] for names in alike for name in names)
        found.append(
            Oddity("classes that differ only in case or space", rows, " and ".join(map(repr, alike[0])))
        )
    if small:
        rows = sum(classes[name] for name in small)
        found.append(Oddity(f"classes of fewer than {SMALL_CLASS_ROWS} rows", rows, shorten(small[0])))
    return found
