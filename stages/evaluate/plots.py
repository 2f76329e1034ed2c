"""Plots of an evaluation as SVG: they open offline, and equal results give equal bytes.

Colours are those of Okabe & Ito, which people with any kind of colour vision tell apart; shape and
position show the same again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.common.escaping import escape_mathtext
from stages.common.svg import draw_figure

BEFORE_COLOUR = "#E69F00"
AFTER_COLOUR = "#0072B2"
GREY = "#666666"

# More bars or labels than this cannot be read; every value is in metrics.json.
MAX_BARS = 45
MAX_CONFUSED = 18


@dataclass(frozen=True, slots=True)
class Bar:
    """A score between 0 and 1 with its interval, and on how many rows and groups it rests."""

    name: str
    value: float
    low: float
    high: float
    n: int
    groups: int


def draw_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Draw base against tuned and the slices and, where there are classes, confusions and calibration."""
    # Scores on other scales are drawn with the others; metrics without bounds are not.
    scales = {one["name"]: one["scale"] for one in report["metrics"] if one["scale"]}
    names = {one["name"]: _name_metric(one) for one in report["metrics"]}
    bars = {
        model: [make_bar(names[name], report[model][name], scale) for name, scale in scales.items()]
        for model in ("base", "tuned")
    }
    percent = round(100 * report["confidence"])
    draw_comparison(
        folder / "comparison.svg",
        bars["base"],
        bars["tuned"],
        f"Base and tuned model on {report['rows']} test rows, with {percent} % intervals",
    )
    scale = scales[report["primary"]]
    slices = {
        tag: [make_bar(value, found, scale) for value, found in by_value.items()]
        for tag, by_value in report["slices"].items()
    }
    primary = report["primary"].replace("_", " ")
    draw_slices(folder / "slices.svg", slices, f"{primary} of the tuned model, with {percent} % intervals")
    if report["class_name"]:
        confused = [(c["expected"], c["answered"], c["n"]) for c in report["confusions"]]
        draw_confusion(
            folder / "confusion.svg", confused, "Confused classes of the tuned model, in test rows"
        )
    if report["calibration"]:
        draw_calibration(folder / "calibration.svg", report["calibration"], "Calibration of the tuned model")


def _name_metric(metric: Mapping[str, Any]) -> str:
    """Return the name of a metric with the direction that is better, if it is not up."""
    name = str(metric["name"]).replace("_", " ").replace("f1", "F1")
    return f"{name} (lower is better)" if "lower is better" in metric["meaning"] else name


def make_bar(name: str, found: Mapping[str, float], scale: float) -> Bar:
    """Return a result on the scale from 0 to 1."""
    value, low, high = (found[key] / scale for key in ("value", "low", "high"))
    return Bar(name, value, low, high, int(found["n"]), int(found.get("groups", 0)))


def draw_calibration(path: Path, calibration: Mapping[str, Any], title: str) -> None:
    """Draw the share of right answers against the probability that the model gave them, bin by bin."""
    bins = [one for one in calibration["bins"] if one["rows"]]
    with _figure(path, title, width=5.0, height=5.0) as axes:
        axes.plot([0, 1], [0, 1], linestyle=":", color=GREY)
        axes.plot(
            [one["confidence"] for one in bins],
            [one["accuracy"] for one in bins],
            marker="D",
            color=AFTER_COLOUR,
        )
        for one in bins:
            place = (one["confidence"], one["accuracy"])
            axes.annotate(str(one["rows"]), place, (4, -10), textcoords="offset points", size=8, color=GREY)
        axes.set_xlim(0.0, 1.02)
        axes.set_ylim(0.0, 1.02)
        axes.set_xlabel("probability of the label")
        axes.set_ylabel("share of right answers (numbers: rows)")
        axes.set_title(f"expected calibration error {calibration['ece']:.3f}", size=9)


def draw_comparison(path: Path, before: Sequence[Bar], after: Sequence[Bar], title: str) -> None:
    """Draw each metric of two models, one below the other, with intervals."""
    with _figure(path, title, width=8.0, height=1.3 + 0.62 * len(after)) as axes:
        for colour, shift, marker, bars, name in (
            (BEFORE_COLOUR, -0.16, "o", before, "base"),
            (AFTER_COLOUR, 0.16, "D", after, "tuned"),
        ):
            places = [place + shift for place in range(len(bars))]
            _draw_points(axes, bars, places, colour, marker, name)
            for bar, place in zip(bars, places, strict=True):
                axes.text(1.04, place, f"{bar.value:.3f}", va="center", color=GREY, size=8, clip_on=False)
        _label_rows(axes, [bar.name for bar in after])
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.09 - 0.5 / len(after)), ncols=2, frameon=False
        )


def draw_slices(path: Path, slices: Mapping[str, Sequence[Bar]], title: str) -> None:
    """Draw one panel a tag: the score of each of its values with interval and number of rows."""
    shown = {
        tag: sorted(bars, key=lambda b: (-b.n, b.name))[:MAX_BARS] for tag, bars in slices.items() if bars
    }
    heights = [max(2, len(bars)) for bars in shown.values()] or [2]
    with _panels(path, title, heights) as panels:
        for axes, (tag, bars) in zip(panels, shown.items(), strict=False):
            bars = sorted(bars, key=lambda b: (-b.value, b.name))
            _draw_points(axes, bars, list(range(len(bars))), AFTER_COLOUR, "D", tag)
            _label_rows(axes, [f"{bar.name}  ({bar.n} in {bar.groups})" for bar in bars])
            hidden = len(slices[tag]) - len(bars)
            note = f", the {MAX_BARS} with most rows" if hidden else ""
            axes.set_title(f"by {escape_mathtext(tag)}{note} (test rows in groups)", loc="left", size=10)
        if not shown:
            panels[0].text(0.5, 0.5, "no test row has one of the configured tags", ha="center", va="center")
            panels[0].set_axis_off()


def draw_confusion(path: Path, pairs: Sequence[tuple[str, str, int]], title: str) -> None:
    """Draw how often one class was answered in place of another.

    Args:
        pairs: expected class, answered class, how often; only the wrong ones.
    """
    top = sorted(pairs, key=lambda p: (-p[2], p[0], p[1]))
    rows: list[str] = []
    columns: list[str] = []
    for expected, given, _ in top:
        if (expected in rows or len(rows) < MAX_CONFUSED) and (
            given in columns or len(columns) < MAX_CONFUSED
        ):
            rows += [expected] * (expected not in rows)
            columns += [given] * (given not in columns)
    counts = {(e, g): n for e, g, n in top if e in rows and g in columns}
    rows, columns = sorted(rows), sorted(columns)
    with _figure(path, title, 4.4 + 0.34 * len(columns), 3.0 + 0.3 * max(2, len(rows))) as axes:
        if not counts:
            axes.text(0.5, 0.5, "no class was confused with another", ha="center", va="center")
            axes.set_axis_off()
            return
        grid = [[counts.get((e, g), 0) for g in columns] for e in rows]
        axes.imshow(grid, cmap="Blues", vmin=0, aspect="auto")
        largest = max(map(max, grid))
        for (e, g), n in counts.items():
            ink = "white" if n > 0.6 * largest else "black"
            axes.text(columns.index(g), rows.index(e), str(n), ha="center", va="center", color=ink, size=8)
        axes.set_xticks(
            range(len(columns)), [escape_mathtext(name) for name in columns], rotation=60, ha="right", size=8
        )
        axes.set_yticks(range(len(rows)), [escape_mathtext(name) for name in rows], size=8)
        axes.set_xlabel("answered")
        axes.set_ylabel("expected")
        axes.tick_params(length=0)
        hidden = sum(n for _, _, n in top) - sum(counts.values())
        if hidden:
            axes.annotate(
                f"{hidden} more confusions are not shown",
                (1, 1.01),
                xycoords="axes fraction",
                ha="right",
                size=8,
                color=GREY,
            )


def _draw_points(
    axes: Any, bars: Sequence[Bar], places: Sequence[float], colour: str, marker: str, name: str
) -> None:
    values = [bar.value for bar in bars]
    # A percentile interval may, by the luck of the draw, end on the wrong side of the figure by a hair.
    below = [max(0.0, bar.value - bar.low) for bar in bars]
    above = [max(0.0, bar.high - bar.value) for bar in bars]
    axes.errorbar(
        values,
        places,
        xerr=[below, above],
        fmt=marker,
        color=colour,
        markersize=5,
        capsize=2.5,
        label=name,
        clip_on=False,
    )


def _label_rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [escape_mathtext(name) for name in names], size=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0.0, 1.0)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


@contextmanager
def _figure(path: Path, title: str, width: float, height: float) -> Iterator[Any]:
    """Yield the axes of a plot with one panel; write it at the end."""
    with draw_figure(path, width, height) as figure:
        yield figure.subplots()
        figure.suptitle(title, size=11)


@contextmanager
def _panels(path: Path, title: str, heights: Sequence[int]) -> Iterator[list[Any]]:
    """Yield panels below each other, as high as they have rows; write the plot at the end."""
    with draw_figure(path, 8.0, 1.0 + 0.7 * len(heights) + 0.21 * sum(heights)) as figure:
        panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)
        yield [row[0] for row in panels]
        figure.suptitle(title, size=11)
