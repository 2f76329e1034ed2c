"""The demo's report: what happened step by step, as Markdown, JSON and on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from flows.demo.tool_replay import ToolCounts
from flows.gate.verdict import GateVerdict
from flows.retrain.progress import RetrainResult
from stages.common.artifacts import write_json, write_text

REPORT = Path("reports") / "demo"


@dataclass(frozen=True, slots=True)
class Step:
    """A step of the demo.

    Attributes:
        at_s, took_s: since the demo began.
        asked, failed: requests.
        result: one line.
    """

    name: str
    at_s: float
    took_s: float
    asked: int
    failed: int
    result: str


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Shares of right answers on old and new traffic, before and after the retraining."""

    old_before: float
    new_before: float
    old_after: float
    new_after: float

    @property
    def recovered(self) -> float:
        """How much of what was lost on the new traffic came back, as a share."""
        lost = self.old_before - self.new_before
        return (self.new_after - self.new_before) / lost if lost > 0 else 1.0


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the report is about."""

    steps: Sequence[Step]
    accuracy: Accuracy
    drift: str
    retraining: RetrainResult
    poisoned: GateVerdict
    minutes: float
    tools: ToolCounts

    @property
    def asked(self) -> int:
        """The number of requests."""
        return sum(step.asked for step in self.steps)

    @property
    def failed(self) -> int:
        """The number of requests that failed."""
        return sum(step.failed for step in self.steps)


def write_report(checkout: Path, result: DemoResult) -> str:
    """Write the report to `reports/demo` of the checkout; return it as Markdown."""
    text = render_report(result)
    write_text(checkout / REPORT / "report.md", text)
    write_json(
        checkout / REPORT / "report.json",
        {
            "accuracy": asdict(result.accuracy) | {"recovered": result.accuracy.recovered},
            "steps": [asdict(step) for step in result.steps],
            "retraining": asdict(result.retraining),
            "requests": result.asked,
            "failed": result.failed,
            "tools": asdict(result.tools),
            "minutes": result.minutes,
            "poisoned": asdict(result.poisoned),
        },
    )
    return text


def render_report(result: DemoResult) -> str:
    """Return the report as Markdown that also reads well on a terminal."""
    steps = [
        [f"{step.at_s / 60:.1f}", step.name, str(step.asked or ""), step.result.split(": ")[0]]
        for step in result.steps
    ]
    accuracy, retraining = result.accuracy, result.retraining
    figures = [
        ["old traffic", format_share(accuracy.old_before), format_share(accuracy.old_after)],
        ["new traffic", format_share(accuracy.new_before), format_share(accuracy.new_after)],
    ]
    return "\n".join(
        [
            _table(["minute", "step", "requests", "result"], steps),
            "",
            _table(["right answers", "before", "after"], figures),
            "",
            f"- recovered of what was lost on the new traffic: {accuracy.recovered * 100:.0f} %",
            f"- {result.drift}",
            f"- {retraining.outcome}: {retraining.summary}",
            f"- the poisoned candidate {result.poisoned.tag} was rejected",
            f"- {format_tools(result.tools)}",
            f"- {result.asked} requests, {result.failed} failed; {result.minutes:.1f} minutes",
            "",
        ]
    )


def format_tools(tools: ToolCounts) -> str:
    """Return what came of the conversations with tools, in one line."""
    cut = f", {tools.cut} cut off by `max_tokens`" if tools.cut else ""
    return (
        f"{tools.conversations} conversations with tools ({tools.asked} requests): {tools.calls} calls, "
        f"{tools.malformed} malformed{cut}; {tools.told} of {tools.results} results answered"
    )


def format_share(share: float | None) -> str:
    """Return a share as percent; "none" without one."""
    return "none" if share is None else f"{share * 100:.1f} %"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", r"\|") for cell in line] for line in (head, *lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in cells]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
