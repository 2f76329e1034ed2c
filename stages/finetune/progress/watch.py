"""What is asked during a training, and when it ends early."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.common.artifacts import reports
from stages.common.errors import InputError
from stages.common.params.loading import Params
from stages.common.records import Row
from stages.common.task.kinds import read_task
from stages.finetune.progress.early_stopping import EarlyStopping
from stages.finetune.progress.validation import Sample, draw_sample

VALIDATION = reports("finetune") / "validation.csv"


@dataclass(frozen=True, slots=True)
class Watch:
    """What is asked during a training.

    Attributes:
        every: the share of the training between two points.
        live: file that has the points while they come; None: they are in the result only.
    """

    sample: Sample
    every: float
    stopping: EarlyStopping | None = None
    live: Path | None = None

    def describe(self) -> dict[str, Any]:
        """Return everything that decides what is asked and when training stops."""
        stopping = asdict(self.stopping) if self.stopping else None
        return {**self.sample.describe(), "every": self.every, "stopping": stopping}


def plan_watch(
    params: Params, tokenizer: Any, rows: Sequence[Row], positions: int | None = None
) -> Watch | None:
    """Return what is asked during the training; None if nothing is, or if no validation row can be asked.

    Args:
        positions: of the base model; None for any number.

    Raises:
        InputError: early stopping is impossible: without rows, or with a metric that cannot decide.
    """
    settings = params.finetune
    if settings.validate_every is None:
        return None
    sample = draw_sample(
        read_task(),
        tokenizer,
        rows,
        params.task.turns,
        settings.validation_rows,
        params.ask_base.max_new_tokens,
        settings.seed,
        positions,
    )
    stopping = settings.early_stopping
    if sample is None:
        if stopping and rows:
            raise InputError(
                "finetune.early_stopping is set, and no validation row fits with its answer into the "
                f"{positions} positions of the base model",
                "lower ask_base.max_new_tokens, choose a base model with a longer context, "
                "or set finetune.early_stopping: null",
            )
        if stopping:
            raise InputError(
                "finetune.early_stopping is set, and there are no validation rows",
                "raise split.validation_fraction, or set finetune.early_stopping: null",
            )
        return None
    if stopping is None:
        return Watch(sample, settings.validate_every, live=VALIDATION)
    sample.check_metric(stopping.metric)
    lower = sample.is_lower_better(stopping.metric)
    early = EarlyStopping(stopping.metric, stopping.patience, lower)
    return Watch(sample, settings.validate_every, early, VALIDATION)
