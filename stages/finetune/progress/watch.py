"""What is asked during a training, and when it ends early."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stages.common.errors import InputError
from stages.common.params.loading import Params
from stages.common.records import Row
from stages.common.task.kinds import read_task
from stages.finetune.progress.early_stopping import EarlyStopping
from stages.finetune.progress.validation import Sample, draw_sample


@dataclass(frozen=True, slots=True)
class Watch:
    """What is asked during a training.

    Attributes:
        every: the share of the training between two points.
    """

    sample: Sample
    every: float
    stopping: EarlyStopping | None = None

    def describe(self) -> dict[str, Any]:
        """Return everything that decides what is asked and when training stops."""
        stopping = asdict(self.stopping) if self.stopping else None
        return {**self.sample.describe(), "every": self.every, "stopping": stopping}


def plan_watch(params: Params, tokenizer: Any, rows: Sequence[Row]) -> Watch | None:
    """Return what is asked during the training; None if nothing is, or if there are no validation rows.

    Raises:
        InputError: early stopping is impossible: without rows, or with a metric that they do not have.
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
    )
    stopping = settings.early_stopping
    if sample is None:
        if stopping:
            raise InputError(
                "finetune.early_stopping is set, and there are no validation rows",
                "raise split.validation_fraction, or set finetune.early_stopping: null",
            )
        return None
    if stopping is None:
        return Watch(sample, settings.validate_every)
    sample.check_metric(stopping.metric)
    lower = sample.is_lower_better(stopping.metric)
    return Watch(sample, settings.validate_every, EarlyStopping(stopping.metric, stopping.patience, lower))
