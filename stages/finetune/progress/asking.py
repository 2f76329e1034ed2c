"""Ask validation rows after some of the updates of a training, and stop it where that is asked for.

Several processes decide by the same points (`Sample.ask`), so that all of them stop, save and load together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from typing_extensions import override

from stages.common.errors import InputError
from stages.common.logs import get_logger, is_full_memory
from stages.common.machine.memory import release_freed_memory
from stages.common.model.generation import LOSS_TOKENS_AT_ONCE
from stages.finetune.devices.group import is_main
from stages.finetune.progress.divergence import SLOWER
from stages.finetune.progress.early_stopping import load_best, write_best
from stages.finetune.progress.validation import (
    ENTRY,
    Sample,
    ValidationPoint,
    attending,
    plan_points,
    read_points,
)
from stages.finetune.progress.watch import Watch
from stages.finetune.result import write_validation_csv

logger = get_logger("finetune")

# Fewer where a training batch has few rows: the memory is estimated for its steps, not for answers. A token
# of an answer keeps its keys and values, one of a step the inputs of every product: over eight times as much.
MOST_AT_ONCE, FOR_EACH_ROW = 32, 8


def choose_questions_at_once(batch_rows: int) -> int:
    """Return how many questions are asked at once.

    Args:
        batch_rows: of a training batch of this process.
    """
    return min(MOST_AT_ONCE, FOR_EACH_ROW * batch_rows)


def estimate_answers(model: Any, sample: Sample, batch_rows: int) -> int:
    """Return the bytes that answers take which are asked at once, besides the weights.

    Keys and values of the prompts are there twice while the loss of the references is computed, behind which
    the answers grow. What one layer computes of all prompts comes before, the references' logits after.
    """
    at_once = min(choose_questions_at_once(batch_rows), len(sample.questions))
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    width = model.dtype.itemsize
    prompt = max(len(question.prompt) for question in sample.questions)
    reference = max(len(question.reference) for question in sample.questions)
    longest = prompt + max(sample.limit, reference)
    cache = 2 * config.num_hidden_layers * groups * size * width * at_once
    layer = at_once * prompt * (4 * config.hidden_size + 3 * inner) * width
    read = min(max(at_once, LOSS_TOKENS_AT_ONCE), at_once * reference)  # tokens of references
    logits = read * config.vocab_size * (width + 4)
    return int(cache * prompt + max(layer, cache * longest + logits))


class Validation(TrainerCallback):
    """Ask the sample after some of the updates, and stop where that is asked for.

    Args:
        attention: by which the model attends without the training's own.
        folder: of the checkpoints.
        batch_rows: of a training batch of this process.

    Attributes:
        at_once: questions of a batch.
        seconds: that the answers took.
        note: of the last point, for the line of progress.
    """

    def __init__(self, watch: Watch, steps: int, attention: str, folder: Path, batch_rows: int) -> None:
        self.watch, self.attention, self.folder = watch, attention, folder
        self.at_once = choose_questions_at_once(batch_rows)
        self.steps = plan_points(steps, watch.every)
        self.seconds = 0.0
        self.note = ""

    @override
    def on_log(
        self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **_: Any
    ) -> None:
        if "loss" not in logs or state.global_step not in self.steps:
            return
        started = time.monotonic()
        # Answers take blocks of other sizes than steps do; together both would take half as much again.
        release_freed_memory()
        with attending(model, self.attention), explain_full_memory_of_answers(self.at_once):
            point = self.watch.sample.ask(model, state.global_step, self.at_once)
        release_freed_memory()
        self.seconds += time.monotonic() - started
        self._check(point)
        state.log_history.append(
            {"step": point.step, ENTRY: {"loss": point.loss, "metrics": dict(point.metrics)}}
        )
        if self.watch.live is not None and is_main():
            # Before the line of the log: whoever reads the line finds the point in the file.
            write_validation_csv(read_points(state.log_history), self.watch.live)
        primary = self.watch.sample.task.primary
        self.note = f", {primary} {point.metrics[primary]:.3f}" if primary in point.metrics else ""
        logger.info(
            "%d validation rows after %d of %d updates: %s",
            len(self.watch.sample.rows),
            point.step,
            state.max_steps,
            point.describe(primary),
        )
        self._decide(model, state, control)

    def _check(self, point: ValidationPoint) -> None:
        if not math.isfinite(point.loss):
            raise InputError(
                f"training has diverged: the loss of the validation rows is {point.loss} "
                f"after update {point.step}",
                SLOWER,
            )

    def _decide(self, model: Any, state: Any, control: Any) -> None:
        stopping = self.watch.stopping
        if stopping is None:
            return
        points = read_points(state.log_history)
        best = stopping.find_best(points)
        if best is points[-1]:
            write_best(model, self.folder, best.step)
        elif stopping.must_stop(points) and state.global_step < state.max_steps:
            logger.info(
                "stopping: %s was best after update %d (%.4f), and not better at %d points since",
                stopping.metric,
                best.step,
                best.read(stopping.metric),
                sum(point.step > best.step for point in points),
            )
            control.should_training_stop = True
            # A run that is killed from here on resumes before this point and decides again.
            control.should_save = False

    def restore_best(self, model: Any, state: Any) -> int:
        """Give the model the weights of the best point, if they are kept; return the step of its weights."""
        step: int = state.global_step
        if self.watch.stopping is None:
            return step
        best = self.watch.stopping.find_best(read_points(state.log_history)).step
        if best != step:
            load_best(model, self.folder, best)
            logger.info("the adapter is that after update %d, the best one", best)
        return best


@contextmanager
def explain_full_memory_of_answers(at_once: int) -> Iterator[None]:
    """Turn a full memory inside the block into an error with what makes answers take less.

    Raises:
        InputError: the memory was full.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_full_memory(error):
            raise
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        fewer = (
            f"lower finetune.batch_size, or finetune.validation_rows below the {at_once} rows asked at once"
            if at_once > 1
            else "lower finetune.max_length or ask_base.max_new_tokens (rows are asked one by one)"
        )
        raise InputError(
            f"the memory is full while validation rows are asked: {message}",
            f"set finetune.validate_every: null, or {fewer}",
        ) from None
