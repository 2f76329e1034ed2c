"""The report of the serving benchmark, and the statistics that its sections share."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.serving_load import Answer, Run
from stages.common.task.json_answers import read_json_answer

CONTENDERS = ("transformers", "bare", "openvino", "llama.cpp", "ctranslate2", "perennial")


@dataclass(frozen=True, slots=True)
class Plan:
    """The size of a benchmark run.

    Attributes:
        seconds: minimum duration of a turn.
        each: minimum number of requests of every client in a turn.
        contenders: names of those in the throughput section.
    """

    rounds: int
    seconds: float
    soak_s: float
    each: int = 2
    contenders: tuple[str, ...] = CONTENDERS


@dataclass(slots=True)
class Report:
    """The result of a section: text for `docs/benchmarks.md`, and the numbers."""

    lines: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def table(self, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Add a table; all columns but the first are right-aligned."""
        self.lines.append("| " + " | ".join(head) + " |")
        self.lines.append("|---|" + "---:|" * (len(head) - 1))
        self.lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
        self.lines.append("")

    def say(self, text: str) -> None:
        """Add a paragraph."""
        self.lines += [text, ""]


def note(text: str) -> None:
    """Log the progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def quantile(values: Sequence[float], share: float) -> float:
    """Return a quantile; NaN without values."""
    return float(np.quantile(values, share)) if values else float("nan")


def ms(values: Sequence[float], *shares: float) -> str:
    """Return quantiles of seconds as ms."""
    return " / ".join(f"{1000 * quantile(values, share):,.0f}" for share in shares) if values else "–"


@dataclass(frozen=True, slots=True)
class Judge:
    """Count the tokens of answers with one tokenizer for all contenders, and check whether they are right."""

    tokenizer: Any
    references: list[str]

    def tokens(self, answers: Sequence[Answer]) -> list[int]:
        """Return how many tokens each answer has."""
        if not answers:
            return []
        ids = self.tokenizer([answer.text for answer in answers], add_special_tokens=False)["input_ids"]
        return [len(one) for one in ids]

    def right(self, answer: Answer) -> bool:
        """Return whether an answer equals the reference, as a JSON value where it is one."""
        reference = self.references[answer.row % len(self.references)]
        wanted, found = read_json_answer(reference), read_json_answer(answer.text)
        if wanted is None or found is None:
            return answer.text.strip() == reference.strip()
        return found.canonical == wanted.canonical

    def tokens_per_s(self, run: Run[Answer]) -> float:
        """Return the tokens/s while all clients were active.

        Of an answer that was incomplete at the end, the tokens written until then count.
        """
        written = 0.0
        for answer, count in zip(run.answers, self.tokens(run.answers), strict=True):
            begun = answer.sent if answer.first is None else answer.first
            length = answer.ended - begun
            share = 1.0 if answer.ended <= run.stopped else max(0.0, run.stopped - begun) / max(length, 1e-9)
            written += count * min(share, 1.0)
        return written / (run.stopped - run.started)


def settled(run: Run[Answer]) -> list[Answer]:
    """Return a turn's answers without the first of each client, which were all sent at the same moment."""
    by_time = sorted(run.answers, key=lambda answer: answer.sent)
    good = [answer for answer in by_time[run.clients :] if answer.ok]
    return good or [answer for answer in by_time if answer.ok]


def speeds(judge: Judge, runs: Sequence[Run[Answer]], others: Sequence[Run[Answer]] = ()) -> list[float]:
    """Return tokens/s of every round, or the ratio to another contender in the same round."""
    own = [judge.tokens_per_s(run) for run in runs]
    if not others:
        return own
    return [
        mine / theirs for mine, theirs in zip(own, map(judge.tokens_per_s, others), strict=False) if theirs
    ]


def by_status(answers: Iterable[Answer]) -> dict[str, int]:
    """Count answers by status; a complete 200 is counted apart from one that was cut off."""
    names = (
        "broken"
        if not answer.status
        else f"{answer.status}" + ("" if answer.ok or answer.status != 200 else " cut")
        for answer in answers
    )
    return dict(sorted(Counter(names).items()))
