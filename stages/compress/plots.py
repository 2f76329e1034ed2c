"""The picture of the smaller models: quality against size and against speed, with the fronts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.common.machine.memory import MIB
from stages.common.svg import draw_figure

# Of Okabe & Ito, which people with any kind of colour vision tell apart.
COLOUR, CHOSEN_COLOUR, GREY = "#0072B2", "#D55E00", "#666666"


def draw_fronts(path: Path, report: Mapping[str, Any]) -> None:
    """Draw each model's primary metric with its interval over its size and over its speed.

    A line joins the models that no other one beats; the chosen one has a diamond.
    """
    primary = report["primary"]
    results = {name: one["results"][primary] for name, one in report["models"].items()}
    sizes = {name: one["bytes"] / MIB for name, one in report["models"].items()}
    speeds = {name: one["alone_tokens_per_s"] for name, one in report["throughput"].items()}
    with draw_figure(path, 9.0, 4.2) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        chosen = report["chosen"]
        _draw(left, sizes, results, report["fronts"]["bytes"], chosen)
        _draw(right, speeds, results, report["fronts"]["tokens_per_s"], chosen)
        left.set(xlabel="size of the file, MiB (left is better)", ylabel=primary.replace("_", " "))
        right.set(xlabel="tokens a second, one request at a time (right is better)")
        percent = f"{100 * report['confidence']:g} %"
        figure.suptitle(
            f"Smaller models on {report['rows']} validation rows, with {percent} intervals", size=11
        )
        figure.draw_without_rendering()  # where names are in the way of each other shows in the layout
        for axes, places in ((left, sizes), (right, speeds)):
            name_points(axes, {name: (place, results[name]["value"]) for name, place in places.items()})


def _draw(
    axes: Any,
    places: Mapping[str, float],
    results: Mapping[str, Mapping[str, float]],
    front: Sequence[str],
    chosen: str | None,
) -> None:
    axes.plot([places[n] for n in front], [results[n]["value"] for n in front], color=GREY, linestyle=":")
    for name, place in places.items():
        found = results[name]
        # A percentile interval may end on the wrong side of the figure by a hair.
        reach = [[max(0.0, found["value"] - found["low"])], [max(0.0, found["high"] - found["value"])]]
        picked = name == chosen
        axes.errorbar(
            [place],
            [found["value"]],
            yerr=reach,
            fmt="D" if picked else "o",
            color=CHOSEN_COLOUR if picked else COLOUR,
            markersize=6,
            capsize=2.5,
        )
    axes.margins(x=0.18)
    axes.grid(color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def name_points(axes: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Write names beside points, from the lowest on, each above those that it would cover."""
    taken: list[Any] = []
    for name, point in sorted(points.items(), key=lambda item: item[1][1]):
        label = axes.annotate(name, point, (6, 6), textcoords="offset points", size=8)
        while any(label.get_window_extent().overlaps(other) for other in taken):
            label.xyann = (6, label.xyann[1] + 2)
        taken.append(label.get_window_extent())
