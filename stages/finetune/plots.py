"""The plot of the loss curve."""

from __future__ import annotations

from pathlib import Path

from stages.common.svg import draw_figure
from stages.finetune.result import TrainingResult, compute_running_mean


def plot_loss(result: TrainingResult, path: Path) -> None:
    """Plot the loss of each update, its running mean, and the validation loss at the end."""
    steps, losses = [p.step for p in result.curve], [p.loss for p in result.curve]
    with draw_figure(path, 7, 4) as drawing:
        axes = drawing.subplots()
        axes.plot(steps, losses, color="#b0c4de", linewidth=0.8, label="each update")
        axes.plot(steps, compute_running_mean(losses), color="#1f4e8c", linewidth=1.8, label="running mean")
        if result.validation_loss is not None:
            axes.scatter(
                steps[-1:],
                [result.validation_loss],
                color="#c0392b",
                zorder=3,
                label="validation, at the end",
            )
        axes.set(xlabel="update", ylabel="loss per answer token", yscale="log", title="finetune: loss")
        axes.grid(alpha=0.3)
        axes.legend()
