"""Stop a training that no longer gets better, and keep its best weights.

What decides are the points in the Trainer's history, which is part of every checkpoint, and the best weights
are in each checkpoint too: a killed training goes on with the decisions of one that was not.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.common.artifacts import atomic_write
from stages.common.model.replaced import list_trained, put_values
from stages.finetune.devices.group import count_processes, is_main
from stages.finetune.progress.validation import ValidationPoint

BEST = "best.safetensors"


@dataclass(frozen=True, slots=True)
class EarlyStopping:
    """When to stop: after `patience` points in a row that are not better than the best before them."""

    metric: str
    patience: int
    lower_is_better: bool

    def find_best(self, points: Sequence[ValidationPoint]) -> ValidationPoint:
        """Return the best point; of several alike, the first."""
        sign = 1 if self.lower_is_better else -1
        return min(points, key=lambda point: sign * point.read(self.metric))

    def must_stop(self, points: Sequence[ValidationPoint]) -> bool:
        """Return whether the last points are no better than the best before them."""
        best = self.find_best(points).step
        return sum(point.step > best for point in points) >= self.patience


def write_best(model: Any, folder: Path, step: int) -> None:
    """Write the trained weights as the best until now; of several processes, the first one does."""
    from safetensors.torch import save_file

    from stages.finetune.devices.sharding import gather_trained

    weights = gather_trained(model)
    if not is_main():
        return
    with atomic_write(folder / BEST) as temporary:
        save_file(weights, temporary, metadata={"step": str(step)})


def load_best(model: Any, folder: Path, step: int) -> None:
    """Give a model its best weights back, which are those after `step`."""
    import torch
    from safetensors import safe_open

    with ExitStack() as opened:
        file = opened.enter_context(safe_open(folder / BEST, framework="pt")) if is_main() else None
        if file and file.metadata() != {"step": str(step)}:
            raise RuntimeError(f"{folder / BEST} is of {file.metadata()}, and the best point of {step}")
        for name, weight in list_trained(model).items():
            whole = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            if file:
                whole.copy_(file.get_tensor(name))
            if count_processes() > 1:  # their hosts may not have the file
                torch.distributed.broadcast(whole, src=0)
            put_values(weight, whole)


def put_best_into(checkpoint: Path) -> None:
    """Put the best weights until now into a checkpoint; none where none are kept."""
    if (best := checkpoint.parent / BEST).is_file():
        _link(best, checkpoint / BEST)


def take_best_from(checkpoint: Path) -> None:
    """Take the best weights from the checkpoint that training goes on from; later ones are not its own."""
    best = checkpoint.parent / BEST
    if not is_main():
        return
    if (checkpoint / BEST).is_file():
        _link(checkpoint / BEST, best)
    else:
        best.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the disk has no such names; it is only ever replaced."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
