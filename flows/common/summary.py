"""Summarise the results of a run: base against tuned model, for the terminal and Prefect's page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.common.artifacts import read_json, reports
from stages.common.escaping import escape_widget

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class MetricValue:
    """A metric with its interval."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        interval = (
            "" if self.low is None or self.high is None else f" ({_number(self.low)} to {_number(self.high)})"
        )
        return f"{_number(self.value)}{interval}"


@dataclass(frozen=True)
class Comparison:
    """One metric of the base and of the tuned model."""

    metric: str
    base: MetricValue
    tuned: MetricValue
    difference: MetricValue | None
    p_value: float | None

    @property
    def change(self) -> str:
        """The difference with its p-value."""
        value = self.difference.value if self.difference else self.tuned.value - self.base.value
        sign = "+" if value >= 0 else "−"
        p = "" if self.p_value is None else f", p {_p(self.p_value)}"
        return f"{sign}{_number(abs(value))}{p}"


def read_results(root: Path) -> list[Comparison] | None:
    """Read the metrics that both models have; None without an evaluation."""
    path = root / reports("evaluate") / "metrics.json"
    return list_comparisons(read_json(path)) if path.exists() else None


def read_resolution(root: Path) -> str:
    """Return what the test can detect, in a sentence; the evaluation must be there."""
    found: str = read_json(root / reports("evaluate") / "metrics.json")["resolution"]["statement"]
    return found


def get_card_path(root: Path) -> Path:
    """Return the path of the model card."""
    return root / reports("model_card") / "README.md"


def list_comparisons(metrics: dict[str, Any]) -> list[Comparison]:
    """Pair the figures of base and tuned in the content of reports/evaluate/metrics.json."""
    base, tuned, difference = (metrics.get(part, {}) for part in ("base", "tuned", "difference"))
    names = [name for name in tuned if _is_metric_value(tuned[name]) and _is_metric_value(base.get(name))]
    known = {metric["name"]: position for position, metric in enumerate(metrics.get("metrics", ()))}
    return [
        Comparison(
            name,
            _metric_value(base[name]),
            _metric_value(tuned[name]),
            _metric_value(difference[name]) if _is_metric_value(difference.get(name)) else None,
            _p_value(difference.get(name)),
        )
        for name in sorted(names, key=lambda name: (known.get(name, len(known)), name))
    ]


def build_table(results: Sequence[Comparison]) -> list[dict[str, str]]:
    """Return the rows of the table artifact."""
    return [
        {
            "metric": escape_widget(_words(result.metric)),
            "base": str(result.base),
            "tuned": str(result.tuned),
            "difference": result.change,
        }
        for result in results
    ]


def build_terminal_table(results: Sequence[Comparison]) -> Table:
    """Return the same rows for a terminal."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("metric", "base", "tuned", "difference"):
        shown.add_column("" if column == "metric" else column, no_wrap=True)
    for row in build_table(results):
        shown.add_row(*map(Text, row.values()))  # metrics are named after the user's keys: not as markup
    return shown


def _is_metric_value(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("value"), int | float)


def _metric_value(value: dict[str, Any]) -> MetricValue:
    return MetricValue(value["value"], value.get("low"), value.get("high"))


def _p_value(value: Any) -> float | None:
    return value.get("p_value", value.get("p")) if isinstance(value, dict) else None


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"
