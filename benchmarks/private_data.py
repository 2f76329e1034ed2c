"""How well personal data and secrets are found: recall, precision and false alarms by kind.

    python -m benchmarks.private_data

Reads `private_texts.jsonl`, texts with the kinds that each holds; all values are made up. A text is a list of
pieces, so that no scanner takes a made-up secret for a real one. Prints a table on stderr and JSON on stdout;
`docs/benchmarks.md` keeps the results.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.common.privacy.personal_data import RECOGNISERS, holds

TEXTS = Path(__file__).parent / "private_texts.jsonl"


@dataclass(frozen=True, slots=True)
class Case:
    """A text, and the kinds of personal data and secrets that it holds."""

    text: str
    kinds: frozenset[str]


@dataclass(frozen=True, slots=True)
class Rates:
    """Counts of the texts with a kind, and of what was found in all.

    Attributes:
        true: texts that hold it; found: of them, those where it was found.
        others: texts that hold nothing; alarms: of them, those where it was found.
        wrong: texts of any sort that do not hold it, where it was found.
    """

    true: int
    found: int
    others: int
    alarms: int
    wrong: int

    @property
    def recall(self) -> float:
        """Share of the texts with the kind in which it was found."""
        return self.found / self.true

    @property
    def precision(self) -> float:
        """Share of what was found that is right."""
        return self.found / max(1, self.found + self.wrong)

    @property
    def false_alarms(self) -> float:
        """Share of the texts that hold nothing in which it was found."""
        return self.alarms / self.others


def read_cases(path: Path = TEXTS) -> list[Case]:
    """Return the labelled texts."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Case("".join(row["text"]), frozenset(row["kinds"])) for row in map(json.loads, lines)]


def measure(cases: Sequence[Case]) -> dict[str, Rates]:
    """Return the rates by kind, and those of `any`: whatever is found counts."""
    found = [frozenset(kind for kind in RECOGNISERS if holds(kind, case.text)) for case in cases]
    rates = {}
    for kind in RECOGNISERS:
        hits = [kind in kinds for kinds in found]
        rates[kind] = _rate([kind in case.kinds for case in cases], hits, cases)
    rates["any"] = _rate([bool(case.kinds) for case in cases], [bool(kinds) for kinds in found], cases)
    return rates


def _rate(true: Sequence[bool], hits: Sequence[bool], cases: Sequence[Case]) -> Rates:
    innocent = [not case.kinds for case in cases]
    return Rates(
        true=sum(true),
        found=sum(t and hit for t, hit in zip(true, hits, strict=True)),
        others=sum(innocent),
        alarms=sum(i and hit for i, hit in zip(innocent, hits, strict=True)),
        wrong=sum(hit and not t for t, hit in zip(true, hits, strict=True)),
    )


def format_rates(rates: dict[str, Rates]) -> str:
    """Return the rates as a Markdown table."""
    lines = ["| kind | texts with it | recall | precision | false alarms |", "|---|---:|---:|---:|---:|"]
    for kind, rate in rates.items():
        lines.append(
            f"| {kind} | {rate.true} | {rate.recall:.3f} | {rate.precision:.3f} "
            f"| {rate.alarms} of {rate.others} ({rate.false_alarms:.1%}) |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and print."""
    cases = read_cases()
    rates = measure(cases)
    sys.stderr.write(format_rates(rates))
    for case in cases:
        found = {kind for kind in RECOGNISERS if holds(kind, case.text)}
        if found != case.kinds:
            sys.stderr.write(f"{sorted(case.kinds)} found as {sorted(found)}: {case.text[:80]!r}\n")
    report = {
        kind: {"recall": r.recall, "precision": r.precision, "alarms": r.alarms} for kind, r in rates.items()
    }
    json.dump(report, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
