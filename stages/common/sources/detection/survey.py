"""Survey rows before training on them: size, classes, duplicates, personal data, oddities.

Rows, classes, lengths, duplicates and conflicts are those of all rows, in one pass. Tokens, personal data and
odd texts of many rows are looked for in a sample: every later stage counts them again, in all rows.
"""

from __future__ import annotations

import json
import random
import re
from array import array
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from stages.common.chat.row_class import read_row_class
from stages.common.messages import Message
from stages.common.privacy.personal_data import RECOGNISERS, holds
from stages.common.privacy.row_texts import list_private_texts
from stages.common.records import Row, count_chars
from stages.common.sources.detection.task_kind import TaskKind
from stages.common.sources.files.entries import shorten
from stages.common.spool import pick
from stages.common.task.tools_task import ToolsTask

MAX_SAMPLED_ROWS = 20_000  # a share of the sample is that of all rows to 0.7 points
MAX_SAMPLED_CHARS = 40_000_000  # of the sample's rows together: about a minute
SAMPLE_SEED = 7
ROWS_A_STEP = 1000  # of progress
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
        own_system: rows with a system message of their own.
        largest_prompt_chars: of all messages before an answer and the tools together.
        most_messages: before an answer.
        classes: rows by class, the largest first; empty for a task without classes.
        duplicates: rows whose messages an earlier row has.
        conflicts: rows whose prompt another row answers differently.
        sampled: the rows of the sample, from which everything below is; `rows` where it is all of them.
        personal_data: sampled rows by kind of personal data, secrets included.
        row_tokens: of prompt and answer together.
        token_counts: of each sampled row, in order of size.
        long_rows: rows of more tokens than training takes, of all rows as the sample tells.
    """

    rows: int
    own_system: int
    question_chars: Spread
    answer_chars: Spread
    largest_prompt_chars: int
    most_messages: int
    classes: Mapping[str, int]
    duplicates: int
    conflicts: int
    sampled: int
    row_tokens: Spread
    answer_tokens: Spread
    token_counts: Sequence[int]
    personal_data: Mapping[str, int]
    long_rows: int
    oddities: tuple[Oddity, ...]

    @property
    def total_tokens(self) -> int:
        """The tokens of all rows, as the sample tells."""
        return round(self.row_tokens.total * self.rows / self.sampled)

    def with_limit(self, max_row_tokens: int) -> Survey:
        """Return the survey with the rows that are too long for another limit."""
        long = len(self.token_counts) - bisect_right(self.token_counts, max_row_tokens)
        return replace(self, long_rows=round(long * self.rows / self.sampled))


class _Totals:
    """What is counted in all rows, in one pass; of their texts nothing is kept but classes."""

    def __init__(self, task: TaskKind) -> None:
        self._task = task
        self.chars = 0
        self.own_system = 0
        self.questions, self.answers = array("q"), array("q")
        self.largest_prompt = 0
        self.most_messages = 0
        self.classes: Counter[str] = Counter()
        self._ids: set[str] = set()
        self._exchanges: Counter[tuple[int, int]] = Counter()

    def add(self, row: Row) -> None:
        self.chars += count_chars(row)
        self.own_system += row.messages[0].role == "system"
        self.questions.append(len(row.question))
        self.answers.append(len(row.answer))
        if (label := _read_row_class(row, self._task)) is not None:
            self.classes[label] += 1
        self._ids.add(row.id)
        self.most_messages = max(self.most_messages, len(row.prompt))
        # By hashes: prompts may be passages.
        prompt = (*(m.answer for m in row.prompt), *(tool.text for tool in row.tools))
        self.largest_prompt = max(self.largest_prompt, sum(map(len, prompt)))
        self._exchanges[hash(prompt), hash(row.answer)] += 1

    def count_duplicates(self) -> int:
        """Return how many rows have the messages of an earlier one."""
        return len(self.questions) - len(self._ids)

    def count_conflicts(self) -> int:
        """Return how many rows have a prompt that occurs with another answer too."""
        answers = Counter(prompt for prompt, _ in self._exchanges)
        return sum(rows for (prompt, _), rows in self._exchanges.items() if answers[prompt] > 1)


def survey_rows(
    rows: Sequence[Row],
    task: TaskKind,
    count_tokens: Callable[[str], int],
    max_row_tokens: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Survey:
    """Measure a set of rows; there must be one at least.

    Args:
        on_progress: called with the number of rows measured so far, now and then.
    """
    totals = _Totals(task)
    for number, row in enumerate(rows, start=1):
        totals.add(row)
        if number % ROWS_A_STEP == 0:
            on_progress(number)
    sample = draw_sample(rows, totals.chars)
    count_cached = lru_cache(maxsize=4096)(count_tokens)  # many rows have the same tools
    prompt_tokens, answer_tokens = array("q"), array("q")
    personal_data: Counter[str] = Counter()
    odd_texts = OddTexts()
    for row in sample:
        turns = sum(count_tokens(_read_turn(message)) for message in row.prompt)
        prompt_tokens.append(turns + sum(count_cached(tool.text) for tool in row.tools))
        answer_tokens.append(count_tokens(_read_turn(row.messages[-1])))
        personal_data.update(find_personal_data(row))
        odd_texts.add(row)
    row_tokens = sorted(map(sum, zip(prompt_tokens, answer_tokens, strict=True)))
    return Survey(
        rows=len(rows),
        own_system=totals.own_system,
        question_chars=measure_spread(totals.questions),
        answer_chars=measure_spread(totals.answers),
        largest_prompt_chars=totals.largest_prompt,
        most_messages=totals.most_messages,
        classes=dict(totals.classes.most_common()),
        duplicates=totals.count_duplicates(),
        conflicts=totals.count_conflicts(),
        sampled=len(sample),
        row_tokens=measure_spread(row_tokens),
        answer_tokens=measure_spread(answer_tokens),
        token_counts=row_tokens,
        personal_data=dict(personal_data.most_common()),
        long_rows=0,
        oddities=(*odd_texts.list_found(), *find_odd_classes(totals.classes)),
    ).with_limit(max_row_tokens)


def draw_sample(rows: Sequence[Row], chars: int) -> Sequence[Row]:
    """Return all rows, or as many at random as are looked at one by one; the same ones each time.

    Args:
        chars: of all rows together.
    """
    most = min(MAX_SAMPLED_ROWS, max(1, len(rows) * MAX_SAMPLED_CHARS // max(1, chars)))
    if len(rows) <= most:
        return rows
    return pick(rows, sorted(random.Random(SAMPLE_SEED).sample(range(len(rows)), most)))


def _read_turn(message: Message) -> str:
    """Return what a turn is written as in a prompt, but for the notation of calls."""
    return f"{message.reasoning}\n{message.answer}" if message.reasoning else message.answer


def _read_row_class(row: Row, task: TaskKind) -> str | None:
    """Return the class of a row: of its answer, or of its first calls."""
    return read_row_class(row, ToolsTask()) if task.kind == "tools" else read_class(row.answer, task)


def read_class(answer: str, task: TaskKind) -> str | None:
    """Return the class of an answer, None for a task without classes or an answer without one."""
    if task.kind == "label":
        return answer.strip()
    if task.label_key is None:
        return None
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    label = value.get(task.label_key) if isinstance(value, dict) else None
    return label if isinstance(label, str) else None


def measure_spread(counts: Iterable[int]) -> Spread:
    """Return the spread of counts, of which there is one at least."""
    ordered = sorted(counts)
    return Spread(
        median=ordered[len(ordered) // 2],
        p95=ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        largest=ordered[-1],
        total=sum(ordered),
    )


def find_personal_data(row: Row) -> list[str]:
    """Return the kinds of personal data in a row, secrets included."""
    texts = [text for _, text in list_private_texts(row)]
    return [kind for kind in RECOGNISERS if any(holds(kind, text) for text in texts)]


class OddTexts:
    """What is unusual in questions and answers, each with its number of rows and the first example."""

    def __init__(self) -> None:
        self._rows: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def add(self, row: Row) -> None:
        """Look at a row."""
        text = f"{row.question}\n{row.answer}"
        for what, pattern in (
            ("text decoded with the wrong encoding", MOJIBAKE),
            ("HTML", MARKUP),
            ("control tokens of a chat template", CONTROL_TOKENS),
            ("placeholders that were not filled", PLACEHOLDERS),
        ):
            if match := pattern.search(text):
                self._note(what, text[max(0, match.start() - 20) : match.end() + 20])
        if "\ufffd" in text:
            self._note("replacement characters (\ufffd): characters are lost", text)
        if row.answer.strip().casefold() in NO_ANSWERS:
            self._note("answers without content", row.answer)
        if row.answer.strip() == row.question.strip():
            self._note("answers that repeat the question", row.answer)

    def _note(self, what: str, example: str) -> None:
        self._rows[what] += 1
        self._examples.setdefault(what, shorten(example))

    def list_found(self) -> list[Oddity]:
        """Return what was found, in the order in which it was."""
        return [Oddity(what, rows, self._examples[what]) for what, rows in self._rows.items()]


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
