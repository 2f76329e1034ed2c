"""The plot of the training: its loss, and how validation rows were answered meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.common.svg import draw_figure
from stages.finetune.progress.validation import ValidationPoint
from stages.finetune.result import TrainingResult, compute_running_mean

WIDTH, HEIGHT = 7, 4  # of one panel, in inches
RED = "#c0392b"


def plot_loss(result: TrainingResult, scales: dict[str, float], path: Path) -> None:
    """Plot the loss of each update, its running mean, and the validation loss; below, the task's metrics.

    Args:
        scales: the metrics that have a largest value, by name, with that value.
    """
    shown = {name for point in result.validation for name in point.metrics} & scales.keys()
    with draw_figure(path, WIDTH, HEIGHT * (2 if shown else 1)) as drawing:
        panels = drawing.subplots(2 if shown else 1, 1, squeeze=False, sharex=True)[:, 0]
        _draw_loss(panels[0], result)
        if shown:
            _draw_metrics(panels[1], result.validation, {name: scales[name] for name in sorted(shown)})
        panels[-1].set(xlabel="update")


def _draw_loss(axes: Any, result: TrainingResult) -> None:
    steps, losses = [p.step for p in result.curve], [p.loss for p in result.curve]
    axes.plot(steps, losses, color="#b0c4de", linewidth=0.8, label="each update")
    axes.plot(steps, compute_running_mean(losses), color="#1f4e8c", linewidth=1.8, label="running mean")
    if points := result.validation:
        label = "validation, a sample"
        axes.plot([p.step for p in points], [p.loss for p in points], "o--", color=RED, label=label)
    if result.validation_loss is not None:
        axes.scatter(
            [result.kept_step],
            [result.validation_loss],
            color=RED,
            marker="D",
            zorder=3,
            label="validation, of the adapter that is kept",
        )
    axes.set(ylabel="loss per answer token", yscale="log", title="finetune: loss")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_metrics(axes: Any, points: list[ValidationPoint], scales: dict[str, float]) -> None:
    for name, scale in scales.items():
        found = [(point.step, point.metrics[name] / scale) for point in points if name in point.metrics]
        axes.plot([step for step, _ in found], [value for _, value in found], "o-", label=name)
    axes.set(ylabel="metric / its maximum", ylim=(-0.02, 1.02), title="answers to validation rows")
    axes.grid(alpha=0.3)
    axes.legend()
