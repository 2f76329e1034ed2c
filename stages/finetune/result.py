"""The result of a training run: its loss curve, its metrics, and what it cost."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from stages.common.artifacts import write_text
from stages.finetune.progress.cost import Cost
from stages.finetune.progress.validation import ValidationPoint

FIGURE = "figure_"  # before the name of an objective's figure in the Trainer's history
# Weight of the past in the running mean: about the last 20 updates.
KEEP = 0.95


@dataclass(frozen=True, slots=True)
class LossPoint:
    """One update: its mean loss (per answer token, or by the objective), and the learning rate it used.

    Attributes:
        figures: what the objective saw in it, by name.
    """

    step: int
    loss: float
    learning_rate: float
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """The loss of every update and of the validation rows, and what this process needed.

    Attributes:
        validation_loss: per answer token, at the end; None without validation rows.
        processes: how many trained together; the memory is of all.
        fast_modules: modules with faster training code, by kind.
        packed: whether batches had no padding.
        gradient_checkpointing: whether layers were computed again in the backward pass.
        validation: the points at which validation rows were asked.
        kept_step: the update after which the adapter was as it is kept; the last one, or the best.
        learned_rows: numbers of the rows that were learned up to there.
        train_tokens: of all updates, with the rows' own answers where others are sampled; `answer_tokens` are
            those that were learned of them.
        seconds: of this process, without those of the validation: the rest of the training if it resumed.
        tokens: trained on in those seconds.
        cost: energy, price and share of the machine.
        held_out: how the model does on what was held out for the objective; None where it has nothing.
    """

    curve: list[LossPoint]
    validation_loss: float | None
    dtype: str
    device: str
    processes: int
    sharded: bool
    share_prefix: bool
    fast_modules: dict[str, int]
    packed: bool
    gradient_checkpointing: bool
    trained_parameters: int
    validation: list[ValidationPoint]
    kept_step: int
    learned_rows: frozenset[int]
    train_tokens: int
    answer_tokens: int
    seconds: float
    validation_seconds: float
    tokens: int
    peak_rss_mib: int
    cost: Cost
    held_out: dict[str, Any] | None = None

    @property
    def train_loss(self) -> float:
        """The running mean of the loss after the last update."""
        return compute_running_mean([point.loss for point in self.curve])[-1]

    @property
    def tokens_per_second(self) -> float:
        """The training speed; tokens of padding do not count."""
        return self.tokens / self.seconds

    def to_metrics(self) -> dict[str, Any]:
        """Return what `metrics.json` reports of it; only `throughput` differs between equal runs."""
        return {
            "steps": len(self.curve),
            "trained_parameters": self.trained_parameters,
            "dtype": self.dtype,
            "device": self.device,
            "processes": self.processes,
            "sharded": self.sharded,
            "share_prefix": self.share_prefix,
            "fast_modules": self.fast_modules,
            "train_loss": self.train_loss,
            "validation_loss": self.validation_loss,
            "validation_points": [
                {"step": point.step, "loss": point.loss, **point.metrics} for point in self.validation
            ],
            "kept_step": self.kept_step,
            **({"figures": figures} if (figures := summarise_figures(self.curve)) else {}),
            **({"held_out": self.held_out} if self.held_out is not None else {}),
            "train_tokens": self.train_tokens,
            "answer_tokens": self.answer_tokens,
            "throughput": {
                "seconds": round(self.seconds, 1),
                "validation_seconds": round(self.validation_seconds, 1),
                "tokens_per_second": round(self.tokens_per_second, 1),
                "peak_rss_mib": self.peak_rss_mib,
                "packed": self.packed,
                "gradient_checkpointing": self.gradient_checkpointing,
                **self.cost.to_metrics(),
            },
        }


def write_loss_csv(curve: Sequence[LossPoint], path: Path) -> None:
    """Write the loss curve as CSV, one update a line, for DVC's plots."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(curve[0].figures) if curve else []
    writer.writerow(["step", "loss", "learning_rate", *names])
    writer.writerows(
        [p.step, f"{p.loss:.6f}", f"{p.learning_rate:.6e}", *(f"{p.figures[name]:.6f}" for name in names)]
        for p in curve
    )
    write_text(path, text.getvalue())


def read_figures(entry: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of the objective in an entry of a Trainer's history."""
    return {name.removeprefix(FIGURE): value for name, value in entry.items() if name.startswith(FIGURE)}


def summarise_figures(curve: Sequence[LossPoint]) -> dict[str, dict[str, float]]:
    """Return the mean of each figure over the first and the last tenth of the updates."""
    tenth = max(1, len(curve) // 10)
    return {
        name: {
            "first": fmean(point.figures[name] for point in curve[:tenth]),
            "last": fmean(point.figures[name] for point in curve[-tenth:]),
        }
        for name in (curve[0].figures if curve else ())
    }


def write_validation_csv(points: Sequence[ValidationPoint], path: Path) -> None:
    """Write the points at which validation rows were asked as CSV, one a line, for DVC's plots."""
    text = io.StringIO()
    # A checkpoint keeps the points with their metrics by name, whatever their order was.
    names = sorted({name for point in points for name in point.metrics})
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", "loss", *names])
    writer.writerows(
        [p.step, f"{p.loss:.6f}", *(f"{p.metrics[name]:.6f}" if name in p.metrics else "" for name in names)]
        for p in points
    )
    write_text(path, text.getvalue())


def compute_running_mean(values: Sequence[float]) -> list[float]:
    """Return the exponentially weighted mean up to each value, without the bias of its start."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = KEEP * total + (1 - KEEP) * value, KEEP * weight + (1 - KEEP)
        means.append(total / weight)
    return means
