"""The picture of a sweep: parallel coordinates, an axis for each key and one for the metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.sweep.space import encode_choice
from flows.sweep.study import TrialResult, find_best
from stages.common.escaping import escape_mathtext
from stages.common.svg import draw_figure

AXIS_WIDTH, MARGIN, HEIGHT = 1.9, 2.2, 4.2  # in inches
COLORS, BEST, STOPPED = "viridis", "#c0392b", "#b0b0b0"
LOG_FROM = 20.0  # positive numbers that differ by this factor are on a logarithmic axis
TICKS = 5


@dataclass(frozen=True, slots=True)
class _Axis:
    """Places of values between 0 and 1, with the labels that are written there."""

    name: str
    places: tuple[float, ...]  # of each trial
    ticks: tuple[tuple[float, str], ...]


def plot_parallel(results: Sequence[TrialResult], metric: str, lower_is_better: bool, path: Path) -> None:
    """Plot the trials that have a value of the metric; the others are in the table only.

    A line is a trial: coloured by its metric if it is complete, grey if it was stopped, red if it is best.
    """
    shown = [one for one in results if one.state != "failed" and one.value is not None]
    varied = [key for key in (shown[0].values if shown else ()) if _is_varied(shown, key)]
    axes_of = [_make_axis(key, [one.values[key] for one in shown]) for key in varied]
    axes_of.append(_make_axis(metric, [one.value for one in shown]))
    best = find_best(results, lower_is_better)
    with draw_figure(path, MARGIN + AXIS_WIDTH * len(axes_of), HEIGHT, font_size=9) as drawing:
        axes = drawing.subplots()
        for at, axis in enumerate(axes_of):
            _draw_axis(axes, at, axis)
        for number, one in enumerate(shown):
            heights = [axis.places[number] for axis in axes_of]
            axes.plot(range(len(axes_of)), heights, **_style(one, one is best, axes_of[-1].places[number]))
        better = "lower is better" if lower_is_better else "higher is better"
        axes.set(
            xlim=(-0.3, len(axes_of) - 0.5),
            ylim=(-0.06, 1.06),
            yticks=[],
            title=f"sweep: {len(shown)} trials, {metric} ({better})",
        )
        axes.set_xticks(
            range(len(axes_of)), [escape_mathtext(axis.name.removeprefix("finetune.")) for axis in axes_of]
        )
        axes.tick_params(axis="x", length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        _draw_legend(axes, shown, best)


def _is_varied(results: Sequence[TrialResult], key: str) -> bool:
    return len({encode_choice(one.values[key]) for one in results}) > 1


def _make_axis(name: str, values: Sequence[Any]) -> _Axis:
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return _make_number_axis(name, [float(value) for value in values])
    texts = list(dict.fromkeys(map(encode_choice, values)))
    height = {text: at / max(1, len(texts) - 1) if len(texts) > 1 else 0.5 for at, text in enumerate(texts)}
    places = tuple(height[encode_choice(value)] for value in values)
    return _Axis(name, places, tuple((at, text.strip('"')) for text, at in height.items()))


def _make_number_axis(name: str, values: Sequence[float]) -> _Axis:
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low == high:
        return _Axis(name, tuple(0.5 for _ in values), ((0.5, f"{low:.4g}"),) if values else ())
    is_log = low > 0 and high / low >= LOG_FROM
    scale = math.log if is_log else float
    first, last = scale(low), scale(high)

    def place(value: float) -> float:
        return (scale(value) - first) / (last - first)

    distinct = sorted(set(values))
    if len(distinct) <= TICKS:
        marks = distinct
    else:
        steps = [first + (last - first) * step / (TICKS - 1) for step in range(TICKS)]
        marks = [math.exp(step) if is_log else step for step in steps]
    return _Axis(name, tuple(map(place, values)), tuple((place(mark), f"{mark:.3g}") for mark in marks))


def _draw_axis(axes: Any, at: int, axis: _Axis) -> None:
    axes.axvline(at, color="#444444", linewidth=0.8, zorder=1)
    for height, label in axis.ticks:
        axes.annotate(
            escape_mathtext(label),
            (at, height),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            zorder=5,
        )
        axes.plot([at], [height], marker="_", color="#444444", markersize=6, zorder=1)


def _style(one: TrialResult, is_best: bool, height: float) -> dict[str, Any]:
    from matplotlib import colormaps

    if is_best:
        return {"color": BEST, "linewidth": 2.6, "zorder": 4, "marker": "o", "markersize": 4}
    if one.state == "pruned":
        return {"color": STOPPED, "linewidth": 1.0, "linestyle": "--", "zorder": 2}
    return {"color": colormaps[COLORS](0.9 * height), "linewidth": 1.4, "zorder": 3}


def _draw_legend(axes: Any, shown: Sequence[TrialResult], best: TrialResult | None) -> None:
    from matplotlib.lines import Line2D

    lines = []
    if best is not None:
        lines.append(Line2D([], [], color=BEST, linewidth=2.6, label=f"best: trial {best.number}"))
    if any(one.state == "complete" and one is not best for one in shown):
        lines.append(Line2D([], [], color="#2a788e", linewidth=1.4, label="complete, coloured by the metric"))
    if any(one.state == "pruned" for one in shown):
        label = "stopped early, metric of its last point"
        lines.append(Line2D([], [], color=STOPPED, linestyle="--", linewidth=1.0, label=label))
    if lines:
        axes.legend(
            handles=lines, loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=len(lines), frameon=False
        )
