"""Train the adapter with a `transformers.Trainer` that takes planned batches and the loss of an objective."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from stages.common.chat.template import Encoded
from stages.common.errors import InputError
from stages.common.logs import get_logger, show_progress
from stages.common.machine.memory import MIB, read_peak_memory, release_freed_memory
from stages.common.model.loading import pick_dtype
from stages.common.model.replaced import list_trained
from stages.finetune.answer_loss import compute_mean_loss, unchunk_head
from stages.finetune.batches import count_tokens, deal_out, plan_batches
from stages.finetune.checkpoint_store import CheckpointStore
from stages.finetune.checkpoints import (
    KEPT,
    PREFIX,
    check_free_space,
    choose_checkpoint,
    collect_states,
    get_step,
    mark_complete,
)
from stages.finetune.devices.group import all_agree, count_processes, gather, get_rank, is_main
from stages.finetune.devices.sharding import is_sharded
from stages.finetune.devices.whole_checkpoints import WholeCheckpointTrainer
from stages.finetune.kernels.checkpointing import checkpoint_layers, decide_checkpointing, list_layers
from stages.finetune.objectives.answers import Answers
from stages.finetune.objectives.protocol import Batch, Objective, Pass, Start, make_idle
from stages.finetune.progress.asking import Validation, estimate_answers
from stages.finetune.progress.cost import Prices, read_taken, write_taken
from stages.finetune.progress.divergence import BatchLoss, check_final_loss, check_update, check_weights
from stages.finetune.progress.early_stopping import put_best_into, take_best_from
from stages.finetune.progress.freed_memory import FreedMemory
from stages.finetune.progress.memory import check_memory, explain_full_memory, plan_memory
from stages.finetune.progress.meter import Meter
from stages.finetune.progress.validation import read_attention, read_points
from stages.finetune.progress.watch import Watch
from stages.finetune.recipe import Recipe
from stages.finetune.result import FIGURE, LossPoint, TrainingResult, read_figures
from stages.finetune.shared_prefix import Layout, lay_out
from stages.finetune.speedups import is_packed, speed_up_training

logger = get_logger("finetune")

ESTIMATED_AFTER_STEPS = 5  # the first is slow: memory and kernels are made


class PlannedTrainer(WholeCheckpointTrainer):
    """A Trainer that takes the planned batches in order, and the loss of each from the objective.

    Several processes take the shares of a batch in turn. Trainer counts the units of all (answer tokens, or
    pairs), and averages gradients and losses over the processes.
    """

    def __init__(self, objective: Objective, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.objective = objective
        self.batch_losses: list[BatchLoss] = []  # of the update that is under way
        self.meter: Meter | None = None
        self.freed = FreedMemory(None)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(train_dataset or self.train_dataset)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log an update with the figures of the objective: in the history, they are in every checkpoint."""
        if "loss" in logs:
            logs = logs | {f"{FIGURE}{name}": value for name, value in self.objective.take_figures().items()}
        super().log(logs, start_time)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the objective's loss of a batch, divided by the units of the whole update.

        Of several processes each returns as many times the sum over its own rows, so that their mean is it.
        """
        assert num_items_in_batch is not None  # Trainer counts the labels
        batch: Batch = inputs["batch"].to(model.device)
        place = self.state.global_step, len(self.batch_losses)
        own = self.objective.compute_loss(model, replace(batch, place=place, record=self.record))
        mean: Tensor = own * self.accelerator.num_processes / num_items_in_batch
        self.batch_losses.append(BatchLoss(batch.rows, mean.detach()))
        return mean

    def record(self, one: Pass) -> None:
        """Make room for a pass that keeps activations, and count it."""
        if one.reader is None:
            self.freed.make_room(one.sequences * one.width)
        if self.meter:
            self.meter.count(one)


class TrainingMonitor(TrainerCallback):
    """Show progress, mark complete checkpoints, and stop when the loss is not a number."""

    def __init__(
        self,
        first_step: int,
        name_row: Callable[[int], str],
        meter: Meter,
        validation: Validation | None = None,
        store: CheckpointStore | None = None,
    ) -> None:
        self.first_step, self.name_row, self.meter = first_step, name_row, meter
        self.validation, self.store = validation, store
        self.batch_losses: list[BatchLoss] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self.meter.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Check the loss of an update and log it with the speed and the time left."""
        if "loss" not in logs:
            return
        checkpoints = Path(args.output_dir)
        check_update(state.global_step, state.max_steps, logs, self.batch_losses, self.name_row, checkpoints)
        self.batch_losses.clear()
        asked = self.validation
        reading = self.meter.read(state.global_step, asked.seconds if asked else 0.0)
        note = f"loss {logs['loss']:.4f}, {self.meter.describe(reading)}{asked.note if asked else ''}"
        show_progress(logger, state.global_step, state.max_steps, note)
        if state.global_step == self.first_step + ESTIMATED_AFTER_STEPS:
            end = datetime.now().astimezone() + timedelta(seconds=reading.seconds_left)
            logger.info(
                "measured: %.0f tokens/s, about %.1f min of training left, until %s",
                reading.tokens_per_second,
                reading.seconds_left / 60,
                end.strftime("%H:%M"),
            )

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Check the weights of the checkpoint, and mark it once every process has written its part."""
        checkpoint = Path(args.output_dir) / f"{PREFIX}{state.global_step}"
        check_weights(model, state.global_step, checkpoint.parent)
        collect_states(checkpoint)
        taken = self.meter.measure_taken()
        if is_main():
            write_taken(checkpoint, taken)
            put_best_into(checkpoint)
            mark_complete(checkpoint)
            if self.store:
                self.store.copy(checkpoint)


def train(
    model: Any,
    objective: Objective,
    validation: Sequence[Encoded],
    pad_id: int,
    recipe: Recipe,
    checkpoints: Path,
    checkpoint_every_steps: int,
    name_row: Callable[[int], str] = "number {}".format,
    watch: Watch | None = None,
    prices: Prices | None = None,
    gradient_checkpointing: bool | str = "auto",
    store: CheckpointStore | None = None,
) -> TrainingResult:
    """Train the weights of `model` that have gradients, from the newest complete checkpoint if there is one.

    Args:
        validation: rows whose answer loss is computed at the end.
        name_row: returns the id of a row of the objective, for messages.
        watch: what is asked during the training, if anything.
        prices: of the machine, for what the training took.
        gradient_checkpointing: compute layers again in the backward pass; `auto`: if the memory asks for it.
        store: where copies of the checkpoints are, if any are made.

    Raises:
        InputError: the disk or the memory is or will be too full, or the loss is not a number.
    """
    attention = read_attention(model)
    share_prefix, fast_modules = speed_up_training(model, objective.sequences, pad_id)
    packed = is_packed(model)
    if not isinstance(objective, Answers):  # the others look at the logits themselves
        unchunk_head(model)
        fast_modules.pop("output_layer", None)
    lengths = objective.lengths
    plan = plan_batches(lengths, recipe.batch_size, recipe.epochs, recipe.seed)
    tokens_of_step = count_tokens(plan, lengths, recipe.gradient_accumulation)
    resumed_from = choose_checkpoint(checkpoints, store)
    first_step = get_step(resumed_from) if resumed_from else 0
    if resumed_from:
        take_best_from(resumed_from)
        logger.info("resuming from step %d of %d (%s)", first_step, len(tokens_of_step), resumed_from)
    trained_parameters = sum(weights.numel() for weights in list_trained(model).values())
    check_free_space(checkpoints, trained_parameters, keeps_best=bool(watch and watch.stopping))
    memory = plan_memory(model, objective.sequences, pad_id, share_prefix, objective.sequences_of_row)
    if memory:
        memory.batches = len(plan)
    sizes = -(-recipe.batch_size // count_processes()), recipe.gradient_accumulation
    heaviest = max(plan, key=lambda batch: len(batch) * max(lengths[row] for row in batch))
    heaviest_share = objective.list_sequences(heaviest[:: count_processes()])
    if memory and watch:
        memory.count_answers = partial(estimate_answers, model, watch.sample)
    checkpointing = decide_checkpointing(
        model, gradient_checkpointing, lambda: all_agree(memory is None or memory.fits(heaviest_share))
    )
    if memory:
        memory.checkpointing = checkpointing
        memory.can_checkpoint = not checkpointing and bool(list_layers(model))
    if checkpointing:
        checkpoint_layers(model)
    estimate = check_memory(memory, heaviest_share, *sizes)

    def arrange(sequences: Sequence[Encoded]) -> Layout:
        return lay_out(sequences, pad_id, share_prefix, packed)

    shortest = min(range(len(lengths)), key=lengths.__getitem__)

    def collate(items: Sequence[list[int]]) -> dict[str, Any]:
        # Every process must compute. One whose share is empty computes a row and learns nothing from it.
        batch = objective.collate(items[0] or [shortest], arrange)
        return _inputs(batch if items[0] else make_idle(batch))

    with explain_full_memory(memory, *sizes):
        objective.prepare(model, Start(plan, arrange, checkpoints, attention))

    validation_points = (
        Validation(watch, len(tokens_of_step), attention, checkpoints, sizes[0]) if watch else None
    )
    dtype = pick_dtype(model.device, recipe.dtype)
    earlier = read_taken(resumed_from) if resumed_from else None
    meter = Meter(model, dtype, tokens_of_step, first_step, prices, earlier)
    monitor = TrainingMonitor(first_step, name_row, meter, validation_points, store)
    trainer = PlannedTrainer(
        objective,
        model=model,
        args=_training_arguments(recipe, len(tokens_of_step), model, checkpoints, checkpoint_every_steps),
        train_dataset=deal_out(plan, count_processes()),
        data_collator=collate,
        callbacks=[monitor, *([validation_points] if validation_points else [])],
    )
    trainer.batch_losses, trainer.meter = monitor.batch_losses, meter
    trainer.freed = FreedMemory(estimate if model.device.type == "cpu" else None)
    trainer.model_accepts_loss_kwargs = True
    trainer.remove_callback(PrinterCallback)
    if count_processes() > 1:
        # Trainer gives all processes the same seed, and so their rows the same dropout.
        torch.manual_seed(hash((recipe.seed, get_rank(), first_step)))
    started = time.monotonic()
    with _clear_failures(checkpoints), explain_full_memory(memory, *sizes):
        trainer.train(resume_from_checkpoint=str(resumed_from) if resumed_from else None)
    if model.device.type != "cpu":
        torch.accelerator.synchronize()
    seconds = time.monotonic() - started
    asked_seconds = validation_points.seconds if validation_points else 0.0
    steps = trainer.state.global_step
    kept_step = validation_points.restore_best(model, trainer.state) if validation_points else steps
    check_weights(model, kept_step, checkpoints)
    release_freed_memory()
    batches = plan_batches([len(e.input_ids) for e in validation], recipe.batch_size, 1, recipe.seed)
    with explain_full_memory(memory, *sizes):
        layouts = (arrange([validation[i] for i in batch]) for batch in batches)
        validation_loss = compute_mean_loss(model, layouts)
        check_final_loss(validation_loss)
        held_out = objective.measure(model, arrange)
    return TrainingResult(
        curve=[
            LossPoint(entry["step"], entry["loss"], entry["learning_rate"], read_figures(entry))
            for entry in trainer.state.log_history
            if "loss" in entry
        ],
        validation_loss=validation_loss,
        dtype=str(dtype).removeprefix("torch."),
        device=model.device.type,
        processes=count_processes(),
        sharded=is_sharded(model),
        share_prefix=share_prefix,
        fast_modules=fast_modules,
        packed=packed,
        gradient_checkpointing=checkpointing,
        trained_parameters=trained_parameters,
        validation=read_points(trainer.state.log_history),
        kept_step=kept_step,
        learned_rows=frozenset(
            row for batch in plan[: kept_step * recipe.gradient_accumulation] for row in batch
        ),
        train_tokens=sum(tokens_of_step[:steps]),
        answer_tokens=sum(count_tokens(plan, objective.learned_counts, recipe.gradient_accumulation)[:steps]),
        seconds=seconds - asked_seconds,
        validation_seconds=asked_seconds,
        cost=meter.finish(seconds - asked_seconds, estimate.peak if estimate else None),
        tokens=sum(gather(meter.tokens)),
        peak_rss_mib=sum(gather(read_peak_memory() // MIB)),
        held_out=held_out,
    )


def _training_arguments(
    recipe: Recipe, steps: int, model: Any, checkpoints: Path, checkpoint_every_steps: int
) -> TrainingArguments:
    device = model.device.type
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        # One item of the data is one process's share of a batch of the plan, and the plan holds all epochs.
        per_device_train_batch_size=1,
        num_train_epochs=1,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule if recipe.schedule != "constant" else "constant_with_warmup",
        # The rate of the first update of a warm-up is 0: a training of nothing else would learn nothing.
        warmup_steps=min(round(recipe.warmup_fraction * steps), steps - 1),
        weight_decay=recipe.weight_decay,
        adam_beta2=recipe.adam_beta2,
        max_grad_norm=recipe.max_grad_norm,
        optim="adamw_torch_fused",
        seed=recipe.seed,
        # The weights have their dtype already; autocasting would convert at every layer.
        bf16=False,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device == "cuda",
        # Several processes: a batch may not reach every expert of a mixture; all other weights always learn.
        ddp_find_unused_parameters=any("expert" in name for name in list_trained(model)),
        ddp_broadcast_buffers=False,
        remove_unused_columns=False,
        save_strategy="steps",
        save_steps=checkpoint_every_steps,
        save_total_limit=KEPT,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would log 0 for a loss that is not a number
        report_to="none",
        disable_tqdm=True,
    )
    if arguments.n_gpu > 1:
        # Each GPU has a process of its own: this one must not divide a batch among all it sees.
        arguments._n_gpu = 1
    return arguments


def _inputs(batch: Batch) -> dict[str, Any]:
    """Return a batch in the form that Trainer expects."""
    # Trainer counts all of `shift_labels`, but would skip the first of `labels`.
    return {
        "batch": batch,
        "input_ids": batch.layout.input_ids,
        "labels": batch.units,
        "shift_labels": batch.units,
    }


@contextmanager
def _clear_failures(folder: Path) -> Iterator[None]:
    """Turn a full disk, which torch and safetensors report in their own ways, into the user's error."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        # safetensors and torch.save raise errors of their own, without a number.
        if not full and shutil.disk_usage(folder).free > 1 << 20:
            raise
        raise InputError(
            f"the disk of {folder} is full: {error}",
            "free some space and run again: training resumes from the last complete checkpoint",
        ) from None
