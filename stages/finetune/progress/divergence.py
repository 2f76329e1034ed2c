"""Stop a training whose loss, gradients or weights are not numbers, and name the rows of the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.common.errors import InputError
from stages.common.model.replaced import list_trained
from stages.finetune.checkpoints import list_complete
from stages.finetune.devices.group import gather
from stages.finetune.devices.sharding import get_part

SHOWN_ROWS = 16  # of a batch, in the message
SLOWER = "lower finetune.learning_rate or finetune.max_grad_norm and run again"
NEVER_LEARNED = "look at these rows, set finetune.dtype: float32, or choose another base model"


@dataclass(frozen=True, slots=True)
class BatchLoss:
    """The rows of a batch (of several processes: of a share of it), and its loss, wherever that is."""

    rows: Sequence[int]
    loss: Tensor | float


def check_update(
    step: int,
    steps: int,
    logs: dict[str, float],
    batches: Sequence[BatchLoss],
    name_row: Callable[[int], str],
    checkpoints: Path,
) -> None:
    """Check the loss and the gradient of an update.

    Args:
        logs: of the Trainer: `loss`, and `grad_norm` where there is one.
        batches: of the update.
        name_row: returns the id of a row by its number.
        checkpoints: the folder whose newest checkpoint the message names.

    Raises:
        InputError: one of them is not a number; the message names the batch and its rows.
    """
    loss, norm = logs["loss"], logs.get("grad_norm", 0.0)
    if math.isfinite(loss) and math.isfinite(norm):
        return
    what = (
        f"the loss is {loss}" if not math.isfinite(loss) else f"the loss is {loss:.4g}, its gradient {norm}"
    )
    # Every process comes here: the loss is the mean of all.
    own = [BatchLoss(batch.rows, float(batch.loss)) for batch in batches]
    batches = [batch for part in gather(own) for batch in part if batch.rows]
    broken = [number for number, batch in enumerate(batches) if not math.isfinite(float(batch.loss))]
    lines = [
        f"  batch {number + 1} of {len(batches)}: rows {name_rows(batches[number].rows, name_row)}"
        for number in broken or range(len(batches))
    ]
    raise InputError(
        "\n".join(
            [
                f"training has diverged: {what} in update {step} of {steps}",
                *lines,
                _describe_kept(checkpoints),
            ]
        ),
        NEVER_LEARNED if step == 1 else SLOWER,
    )


def check_weights(model: Any, step: int, checkpoints: Path) -> None:
    """Check the trained weights after an update, before they are kept.

    Raises:
        InputError: a weight is not a number; the message names its tensor.
    """
    broken = [
        name for name, weight in list_trained(model).items() if not torch.isfinite(get_part(weight)).all()
    ]
    # Of a shared model only one process may have the part, and all must stop.
    for name in (name for names in gather(broken[:1]) for name in names):
        raise InputError(
            f"training has diverged: {name} has weights that are not numbers after update {step}\n"
            f"{_describe_kept(checkpoints)}",
            SLOWER,
        )


def check_final_loss(loss: float | None) -> None:
    """Check the loss of the validation rows at the end, before anything is overwritten.

    Raises:
        InputError: it is not a number.
    """
    if loss is not None and not math.isfinite(loss):
        raise InputError(f"training has diverged: the loss of the validation rows is {loss}", SLOWER)


def name_rows(rows: Sequence[int], name_row: Callable[[int], str]) -> str:
    """Return the ids of the first rows as text, and how many more there are."""
    names = ", ".join(name_row(row) for row in rows[:SHOWN_ROWS])
    return names if len(rows) <= SHOWN_ROWS else f"{names} and {len(rows) - SHOWN_ROWS} more"


def _describe_kept(checkpoints: Path) -> str:
    kept = list_complete(checkpoints)
    return f"  kept: {kept[-1]}" if kept else "  no checkpoint was written before it"
