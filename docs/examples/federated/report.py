"""The result of a federated training in the files of the stage `finetune`, which later stages read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from docs.examples.federated.adapters import Adapter, write_adapter
from docs.examples.federated.rounds import Round
from stages.common.artifacts import artifacts, atomic_dir, reports, write_json
from stages.common.machine.memory import MIB, read_peak_memory
from stages.common.svg import draw_figure
from stages.finetune.progress.validation import ValidationPoint
from stages.finetune.result import LossPoint, write_loss_csv, write_validation_csv


def write_result(adapter: Adapter, rounds: Sequence[Round], rate: float, counts: Mapping[str, Any]) -> None:
    """Write the averaged adapter, its metrics and its curves.

    Args:
        rate: peak learning rate of every round.
        counts: of the rows, and where the training started, by the names that the model card reads.
    """
    with atomic_dir(artifacts("finetune")) as folder:
        write_adapter(adapter, folder)
    folder = reports("finetune")
    steps = _count_updates(rounds)
    write_loss_csv(
        [LossPoint(step, one.train_loss, rate) for step, one in zip(steps, rounds, strict=True)],
        folder / "loss.csv",
    )
    points = [
        ValidationPoint(step, one.validation_loss, {})
        for step, one in zip(steps, rounds, strict=True)
        if one.validation_loss is not None
    ]
    write_validation_csv(points, folder / "validation.csv")
    plot_rounds(rounds, folder / "loss.svg")
    write_json(folder / "metrics.json", {**summarise(rounds, steps, points), "learning_rate": rate, **counts})


def summarise(
    rounds: Sequence[Round], steps: Sequence[int], points: Sequence[ValidationPoint]
) -> dict[str, Any]:
    """Return what the rounds came to, by the names of the stage's metrics."""
    last = rounds[-1]
    clients = [client for one in rounds for client in one.clients]
    seconds = sum(client["seconds"] for client in clients)
    tokens = sum(client["train_tokens"] for client in clients)
    return {
        **last.settings,
        "federated": {"clients": len(last.clients), "rounds": len(rounds)},
        "steps": steps[-1],
        "kept_step": steps[-1],
        "train_rows": sum(client["rows"] for client in last.clients),
        "train_tokens": tokens,
        "answer_tokens": sum(client["answer_tokens"] for client in clients),
        "trained_parameters": last.clients[0]["trained_parameters"],
        "train_loss": last.train_loss,
        "validation_loss": last.validation_loss,
        "validation_points": [{"step": point.step, "loss": point.loss} for point in points],
        "processes": 1,
        "throughput": {
            "seconds": round(seconds, 1),
            "tokens_per_second": round(tokens / max(seconds, 0.1), 1),
            "peak_rss_mib": read_peak_memory() // MIB,
        },
    }


def plot_rounds(rounds: Sequence[Round], path: Path) -> None:
    """Plot the loss of the clients' trainings and of the averaged adapter, by round."""
    with draw_figure(path, 7, 4) as drawing:
        axes = drawing.subplots()
        numbers = [one.number for one in rounds]
        axes.plot(
            numbers, [one.train_loss for one in rounds], "o-", color="#1f4e8c", label="clients' training"
        )
        measured = {one.number: one.validation_loss for one in rounds if one.validation_loss is not None}
        numbers, losses = list(measured), list(measured.values())
        axes.plot(numbers, losses, "o--", color="#c0392b", label="validation, of the average")
        axes.set(xlabel="round", ylabel="loss per answer token", yscale="log", title="federated: loss")
        axes.grid(alpha=0.3)
        axes.legend()


def _count_updates(rounds: Sequence[Round]) -> list[int]:
    """Return how many updates a client has made at most at the end of each round."""
    steps, done = [], 0
    for one in rounds:
        done += one.updates
        steps.append(done)
    return steps
