"""Finetune: train a LoRA adapter on the base model.

In: `artifacts/split/train.parquet`, `validation.parquet`, `artifacts/fetch_base/`; `artifacts/start/` with an
adapter to learn on from, or nothing.
Out: `artifacts/finetune/` (a peft adapter); `reports/finetune/metrics.json`, `loss.csv`, `loss.svg`.
Run: `python -m stages.finetune`

Only the answers are learned. A killed run goes on from its last whole checkpoint in
`checkpoints/finetune/<fingerprint>/` and ends with the very adapter of an unbroken run.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import math
import random
import resource
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.common.adapter import CONFIG, WEIGHTS, Start, check_base, read_start, write_learned
from stages.common.artifacts import (
    artifacts,
    atomic_dir,
    atomic_write,
    read_json,
    reports,
    write_json,
    write_text,
)
from stages.common.chat import Encoded, encode_example
from stages.common.errors import InputError
from stages.common.logs import get_logger, progress, run_stage
from stages.common.params.loading import load_params
from stages.common.records import Row, canonical_json, read_rows

if TYPE_CHECKING:
    import torch

    from stages.finetune.shared_prefix import Layout

log = get_logger("finetune")

CHECKPOINTS = Path("checkpoints") / "finetune"
# Written into a checkpoint when everything else in it is on the disk.
COMPLETE = "complete.json"
# Rows of about one length share a batch; rows this many batches apart never do, so the order stays random.
BATCHES_SORTED_TOGETHER = 20
# Checkpoints of other parameters that are kept, for a user who goes back to them.
OTHER_RUNS_KEPT = 1


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides the adapter, besides the rows and the base model. See `finetune` in `params.yaml`."""

    rank: int
    alpha: float
    dropout: float
    target_modules: str | tuple[str, ...]
    learning_rate: float
    schedule: str
    warmup_fraction: float
    weight_decay: float
    max_grad_norm: float
    batch_size: int
    gradient_accumulation: int
    epochs: int
    dtype: str
    seed: int


@dataclass(frozen=True, slots=True)
class Point:
    """One update: its mean loss per answer token, and the learning rate it used."""

    step: int
    loss: float
    learning_rate: float


@dataclass(frozen=True, slots=True)
class Trained:
    """What training gave, and what the machine needed in this process (the rest of a resumed run)."""

    curve: list[Point]
    share_prefix: bool
    fast_modules: dict[str, int]
    trained_parameters: int
    seconds: float
    tokens: int


def encode_rows(
    tokenizer: Any, rows: Sequence[Row], max_length: int, on_long_row: str
) -> tuple[list[Encoded], list[Row]]:
    """Return the rows as token ids, and the rows left out because they are longer than `max_length`.

    Raises:
        InputError: a row is too long and `on_long_row` is `stop`, or none is left.
    """
    examples, long = [], []
    for row in rows:
        example = encode_example(tokenizer, row.messages)
        if len(example.input_ids) > max_length:
            long.append(row)
        else:
            examples.append(example)
    if long and on_long_row == "stop":
        shown = "\n".join(f"  row {row.id} from {row.source}: {row.question[:60]!r}" for row in long[:10])
        raise InputError(
            f"{len(long)} of {len(rows)} rows are longer than {max_length} tokens:\n{shown}",
            "raise finetune.max_length, shorten the rows, or set finetune.on_long_row: drop",
        )
    if rows and not examples:
        raise InputError(
            f"all {len(rows)} rows are longer than {max_length} tokens", "raise finetune.max_length"
        )
    return examples, long


def rows_to_learn(
    rows: Sequence[Row], start: Start | None, learned: Set[str], replay_share: float, seed: int
) -> list[Row]:
    """Return the rows that are new to the adapter of `start`, and a share of those it has learned.

    Which ones is drawn by a hash of their ids, another share for each start: in a line of retrainings every
    row has its turn. Without a start every row is new.

    Args:
        learned: ids of the rows that the adapter has learned.

    Raises:
        InputError: none is left.
    """
    if start is None:
        return list(rows)
    if replay_share < 1 and not learned:
        log.warning(
            "the adapter of %s does not say which rows it has learned: all are gone over", start.version
        )

    def drawn(row: Row) -> bool:
        digest = hashlib.blake2b(f"{seed}/{start.version}/{row.id}".encode(), digest_size=8).digest()
        return int.from_bytes(digest) < replay_share * 2**64

    chosen = [row for row in rows if row.id not in learned or drawn(row)]
    if rows and not chosen:
        raise InputError(
            f"all {len(rows)} training rows are known to the adapter of {start.version} already",
            "raise finetune.replay_share, or set finetune.start_from: null",
        )
    return chosen


def plan_batches(lengths: Sequence[int], batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """Return the batches of the whole training, as row numbers; equal arguments give equal batches.

    Each epoch takes every row once, in its own random order, rows of about one length together.
    """
    plan: list[list[int]] = []
    for epoch in range(epochs):
        rng = random.Random(f"{seed} {epoch}")
        order = list(range(len(lengths)))
        rng.shuffle(order)
        batches = []
        reach = batch_size * BATCHES_SORTED_TOGETHER
        for start in range(0, len(order), reach):
            near = sorted(order[start : start + reach], key=lambda row: (lengths[row], row))
            batches += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
        rng.shuffle(batches)
        plan += batches
    return plan


def fingerprint(recipe: Recipe, examples: Sequence[Encoded], base: Path, start: Start | None = None) -> str:
    """Return a name for everything that decides the result: a checkpoint of another name is not resumed."""
    here = Path(__file__).resolve().parent
    code = [*sorted(here.glob("*.py")), *(here.parent / "common" / f"{name}.py" for name in _SHARED_CODE)]
    parts = {
        "recipe": asdict(recipe),
        "rows": hashlib.sha256(
            json.dumps([[e.prompt_length, e.input_ids] for e in examples]).encode()
        ).hexdigest(),
        "base": {p.name: _file_digest(p) for p in sorted(base.iterdir()) if p.is_file()},
        "start": {p.name: _file_digest(p) for p in start.files} if start else {},
        "code": {path.name: _file_digest(path) for path in code},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
    }
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:16]


_SHARED_CODE = ("adapter", "models")


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def whole_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint whose every byte was written, and remove the broken ones."""
    whole: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        if _is_whole(path):
            whole.append((int(path.name.removeprefix("checkpoint-")), path))
        else:
            log.info("removing %s: it was not written to its end", path)
            shutil.rmtree(path)
    return max(whole)[1] if whole else None


def mark_whole(checkpoint: Path) -> None:
    """Note the size of every file of a checkpoint, once all of them are written."""
    sizes = {path.name: path.stat().st_size for path in sorted(checkpoint.iterdir()) if path.is_file()}
    write_json(checkpoint / COMPLETE, sizes)


def _is_whole(checkpoint: Path) -> bool:
    try:
        sizes = read_json(checkpoint / COMPLETE)
    except InputError:
        return False
    return all((checkpoint / n).is_file() and (checkpoint / n).stat().st_size == s for n, s in sizes.items())


def forget_other_runs(folder: Path, kept: int) -> None:
    """Remove all but the `kept` newest folders of checkpoints beside `folder`."""
    if not folder.parent.exists():
        return
    others = [path for path in folder.parent.iterdir() if path.is_dir() and path != folder]
    for path in sorted(others, key=lambda p: p.stat().st_mtime, reverse=True)[kept:]:
        shutil.rmtree(path)


def build_model(base: Path, recipe: Recipe) -> Any:
    """Load the base model and put a new adapter on it; its start follows from the seed."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    from stages.common.models import load_base, pick_device, pick_dtype

    device = pick_device()
    model = load_base(base, pick_dtype(device, recipe.dtype), device)
    set_seed(recipe.seed)
    targets = recipe.target_modules
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    try:
        # The adapter's own weights stay float32: small updates would vanish in bfloat16.
        return get_peft_model(model, config)
    except ValueError as error:
        raise InputError(
            f"the adapter does not fit the base model: {error}",
            "set finetune.target_modules to all-linear, or to module names that the model has",
        ) from None


def adapter_in(folder: Path) -> dict[str, Any]:
    """Return what the adapter in `folder` is made of, in the words of `params.yaml`."""
    config = read_json(folder / CONFIG)
    targets = config.get("target_modules")
    return {
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "target_modules": tuple(sorted(targets)) if isinstance(targets, list) else targets,
    }


def go_on_from(model: Any, start: Start) -> None:
    """Give the new adapter of `model` the weights of the one in `start`.

    peft would leave tensors that it does not find as they are, without a word: a new adapter, half
    random. So every tensor must be in the file, with its shape, and nothing else.

    Raises:
        InputError: the two adapters are not alike; the message has what both are.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = model.peft_config["default"]
    targets = config.target_modules
    wanted = {
        "rank": config.r,
        "alpha": config.lora_alpha,
        "target_modules": targets if isinstance(targets, str) else tuple(sorted(targets)),
    }
    found = adapter_in(start.folder)
    fix = (
        f"set finetune.rank, alpha and target_modules to what {start.folder} has, or empty {start.folder}, "
        "and a new adapter is trained"
    )
    unlike = [name for name in wanted if wanted[name] != found[name]]
    if unlike:
        lines = "\n".join(f"  {name}: {wanted[name]} here, {found[name]} there" for name in unlike)
        raise InputError(
            f"the adapter in {start.folder} ({start.version}) is not like the one to be trained:\n{lines}",
            fix,
        )
    try:
        weights = load_file(start.folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{start.folder / WEIGHTS} cannot be read: {error}", f"put it there anew, or empty {start.folder}"
        ) from None
    shapes = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
    there = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if shapes != there:
        odd = sorted(name for name in shapes.keys() | there.keys() if shapes.get(name) != there.get(name))
        raise InputError(
            f"the adapter in {start.folder} ({start.version}) has other tensors than the one to be trained, "
            f"{len(odd)} of them: {odd[0]} is {there.get(odd[0])} there and {shapes.get(odd[0])} here",
            fix,
        )
    set_peft_model_state_dict(model, weights)


def speed_up_training(model: Any, examples: Sequence[Encoded], pad_id: int) -> tuple[bool, dict[str, int]]:
    """Make training steps of `model` fast, where its answers stay the same.

    Some architectures compute in ways of their own. So the loss of a few rows is taken before and
    after, and if it differs everything is put back.

    Returns:
        whether a batch is one sequence with a shared prefix, and the number of modules made fast, by kind.
    """
    from stages.finetune.fast_lora import keep_freed_memory, slow_down, speed_up
    from stages.finetune.shared_prefix import can_share_prefix, lay_out, use_shared_prefix

    keep_freed_memory()
    base = model.get_base_model()
    few = sorted(examples, key=lambda e: len(e.input_ids))[-4:]
    plain = answer_loss(model, lay_out(few, pad_id, share_prefix=False))
    usual_attention = base.config._attn_implementation
    share_prefix = can_share_prefix(base)
    if share_prefix:
        use_shared_prefix(base)
    modules = speed_up(model)
    fast = answer_loss(model, lay_out(few, pad_id, share_prefix))
    # bfloat16 keeps three digits; a wrong attention changes the first.
    if abs(fast - plain) <= 0.02 * abs(plain) + 0.01:
        return share_prefix, modules
    log.warning("this model needs its own way (loss %.4f, else %.4f): training is slower", plain, fast)
    slow_down(model)
    base.set_attn_implementation(usual_attention)
    return False, {}


def answer_loss(model: Any, batch: Layout) -> float:
    """Return the mean loss per answer token of one batch, without learning from it."""
    import torch

    from stages.finetune.answer_loss import cross_entropy_sum

    with torch.no_grad():
        batch = batch.to(model.device)
        return float(cross_entropy_sum(batch.answer_logits(model), batch.targets)) / len(batch.targets)


def mean_loss(model: Any, batches: Sequence[Layout]) -> float | None:
    """Return the mean loss per answer token over batches, or None if there are none."""
    model.eval()
    total = sum(answer_loss(model, batch) * len(batch.targets) for batch in batches)
    tokens = sum(len(batch.targets) for batch in batches)
    return total / tokens if tokens else None


def train(
    model: Any,
    examples: Sequence[Encoded],
    pad_id: int,
    recipe: Recipe,
    checkpoints: Path,
    checkpoint_every_steps: int,
) -> Trained:
    """Train the adapter of `model`, from the newest whole checkpoint in `checkpoints` if there is one.

    Raises:
        InputError: the disk is or will be too full, memory runs out, or the loss is no number any more.
    """
    import torch
    from transformers import PrinterCallback, TrainingArguments

    from stages.finetune.shared_prefix import lay_out

    share_prefix, fast_modules = speed_up_training(model, examples, pad_id)
    plan = plan_batches([len(e.input_ids) for e in examples], recipe.batch_size, recipe.epochs, recipe.seed)
    steps = math.ceil(len(plan) / recipe.gradient_accumulation)
    resumed_from = whole_checkpoint(checkpoints)
    first_step = int(resumed_from.name.removeprefix("checkpoint-")) if resumed_from else 0
    if resumed_from:
        log.info("resuming from step %d of %d (%s)", first_step, steps, resumed_from)
    trained_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    check_free_space(checkpoints, trained_parameters)
    tokens_of_step = [
        sum(
            len(examples[row].input_ids)
            for batch in plan[s : s + recipe.gradient_accumulation]
            for row in batch
        )
        for s in range(0, len(plan), recipe.gradient_accumulation)
    ]
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        # One item of the data is one whole batch of the plan, and the plan holds all epochs.
        per_device_train_batch_size=1,
        num_train_epochs=1,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule if recipe.schedule != "constant" else "constant_with_warmup",
        warmup_steps=round(recipe.warmup_fraction * steps),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        optim="adamw_torch_fused",
        seed=recipe.seed,
        # The weights have their dtype already; autocasting would convert at every layer.
        bf16=False,
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=model.device.type == "cuda",
        remove_unused_columns=False,
        save_strategy="steps",
        save_steps=checkpoint_every_steps,
        save_total_limit=2,
        logging_strategy="steps",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    if arguments.n_gpu > 1:
        # A batch is one sequence: it cannot be dealt out to several GPUs.
        arguments._n_gpu = 1
    trainer_class, watch_class = _trainer_classes()
    watch = watch_class(tokens_of_step, first_step)
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=plan,
        data_collator=lambda items: _inputs(lay_out([examples[i] for i in items[0]], pad_id, share_prefix)),
        callbacks=[watch],
    )
    trainer.model_accepts_loss_kwargs = True
    trainer.remove_callback(PrinterCallback)
    started = time.monotonic()
    with _clear_failures(checkpoints):
        trainer.train(resume_from_checkpoint=str(resumed_from) if resumed_from else None)
    curve = [
        Point(entry["step"], entry["loss"], entry["learning_rate"])
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    if model.device.type != "cpu":
        torch.accelerator.synchronize()
    return Trained(
        curve=curve,
        share_prefix=share_prefix,
        fast_modules=fast_modules,
        trained_parameters=trained_parameters,
        seconds=time.monotonic() - started,
        tokens=sum(tokens_of_step[first_step:]),
    )


def _inputs(batch: Layout) -> dict[str, Any]:
    """Return a batch as Trainer wants it."""
    # Trainer counts `shift_labels` as they are, where it would leave out the first of `labels`.
    return {
        "batch": batch,
        "input_ids": batch.input_ids,
        "labels": batch.targets,
        "shift_labels": batch.targets,
    }


def _trainer_classes() -> tuple[type, type]:
    """Return our Trainer and its callback; made here because importing transformers takes seconds."""
    import torch
    from transformers import Trainer, TrainerCallback

    from stages.finetune.answer_loss import cross_entropy_sum

    class AnswerTrainer(Trainer):
        """A Trainer that takes the planned batches in order and learns the answers only."""

        def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
            return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)

        def compute_loss(
            self,
            model: Any,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: torch.Tensor | int | None = None,
        ) -> torch.Tensor:
            """Return the sum of the answers' losses over the answer tokens of the whole update."""
            assert num_items_in_batch is not None  # Trainer counts the labels
            batch = inputs["batch"].to(model.device)
            return cross_entropy_sum(batch.answer_logits(model), batch.targets) / num_items_in_batch

    class Watch(TrainerCallback):
        """Shows progress, marks whole checkpoints, and stops at a loss that is no number."""

        def __init__(self, tokens_of_step: Sequence[int], first_step: int) -> None:
            self.tokens_of_step, self.first_step = tokens_of_step, first_step
            self.started = time.monotonic()

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.started = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" not in logs:
                return
            if not (math.isfinite(logs["loss"]) and math.isfinite(logs.get("grad_norm", 0.0))):
                raise InputError(
                    f"the loss is {logs['loss']} at step {state.global_step}: training has diverged",
                    "lower finetune.learning_rate or finetune.max_grad_norm and run again",
                )
            elapsed = time.monotonic() - self.started
            speed = sum(self.tokens_of_step[self.first_step : state.global_step]) / elapsed
            left = sum(self.tokens_of_step[state.global_step :]) / speed
            note = f"loss {logs['loss']:.4f}, {speed:.0f} tokens/s, {_minutes(left)} left"
            progress(log, state.global_step, state.max_steps, note)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            mark_whole(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    return AnswerTrainer, Watch


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def check_free_space(folder: Path, trained_parameters: int) -> None:
    """Fail before the work if the disk cannot hold the checkpoints.

    Three at once (two kept, one being written), each with the adapter and two moments in float32.
    """
    folder.mkdir(parents=True, exist_ok=True)
    needed = 3 * 3 * 4 * trained_parameters
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"the disk of {folder} has {free >> 20} MiB left, and the checkpoints need {needed >> 20} MiB",
            "free some space, or lower finetune.rank",
        )


@contextmanager
def _clear_failures(folder: Path) -> Iterator[None]:
    """Turn a full disk and a full memory into the user's errors; torch reports both in words of its own."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"the GPU's memory is full: {str(error).splitlines()[0]}",
            "lower finetune.batch_size (and raise finetune.gradient_accumulation by as much)",
        ) from None
    except (OSError, RuntimeError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        # safetensors and torch.save raise errors of their own, without a number.
        if not full and shutil.disk_usage(folder).free > 1 << 20:
            raise
        raise InputError(
            f"the disk of {folder} is full: {error}",
            "free some space and run again: training goes on from the last whole checkpoint",
        ) from None


def save_adapter(model: Any, folder: Path, learned: Iterable[str]) -> None:
    """Write the adapter, and which rows it has learned, so that equal adapters are equal bytes."""
    with atomic_dir(folder) as beside:
        model.save_pretrained(beside)
        # peft's own card is an empty form; the model_card stage writes the real one.
        (beside / "README.md").unlink(missing_ok=True)
        config = read_json(beside / "adapter_config.json")
        if isinstance(config["target_modules"], list):
            # peft writes a set, in an order that changes from process to process.
            config["target_modules"] = sorted(config["target_modules"])
        write_json(beside / "adapter_config.json", config)
        write_learned(learned, beside)


def loss_csv(curve: Sequence[Point]) -> str:
    """Return the loss curve as CSV, for DVC's plots."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", "loss", "learning_rate"])
    writer.writerows([p.step, f"{p.loss:.6f}", f"{p.learning_rate:.6e}"] for p in curve)
    return text.getvalue()


def draw_loss(curve: Sequence[Point], validation_loss: float | None, path: Path) -> None:
    """Draw the loss of each update, its running mean, and the validation loss at the end."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    steps, losses = [p.step for p in curve], [p.loss for p in curve]
    # The ids in an SVG are random without a salt, and its metadata hold the date.
    with mpl.rc_context({"svg.hashsalt": "finetune", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(steps, losses, color="#b0c4de", linewidth=0.8, label="each update")
        axes.plot(steps, _running_mean(losses, 0.95), color="#1f4e8c", linewidth=1.8, label="running mean")
        if validation_loss is not None:
            axes.scatter(
                [steps[-1]], [validation_loss], color="#c0392b", zorder=3, label="validation, at the end"
            )
        axes.set(xlabel="update", ylabel="loss per answer token", yscale="log", title="finetune: loss")
        axes.grid(alpha=0.3)
        axes.legend()
        with atomic_write(path) as beside:
            figure.savefig(beside, format="svg", metadata={"Date": None})


def _running_mean(values: Sequence[float], keep: float) -> list[float]:
    """Return the exponentially weighted mean so far, without the pull of its start."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(total / weight)
    return means


def peak_rss_mib() -> int:
    """Return the most memory this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)


def main() -> None:
    """Train on what `split` wrote, as `finetune` in `params.yaml` says."""
    params = load_params().finetune
    recipe = Recipe(**params.model_dump(include=set(Recipe.__dataclass_fields__)))
    all_rows = read_rows(artifacts("split") / "train.parquet")
    validation_rows = read_rows(artifacts("split") / "validation.parquet")
    if not all_rows:
        raise InputError("artifacts/split/train.parquet has no rows", "check reports/split/metrics.json")

    from stages.common.models import load_tokenizer
    from stages.finetune.shared_prefix import lay_out

    base = artifacts("fetch_base")
    start = read_start(Path(params.start_from)) if params.start_from else None
    if start:
        check_base(start, read_json(reports("fetch_base") / "metrics.json")["sha256"])
    learned = start.learned() if start else frozenset()
    train_rows = rows_to_learn(all_rows, start, learned, params.replay_share, params.seed)
    tokenizer = load_tokenizer(base)
    examples, long = encode_rows(tokenizer, train_rows, params.max_length, params.on_long_row)
    held_out, _ = encode_rows(tokenizer, validation_rows, params.max_length, "drop")
    if long:
        log.info("%d rows left out: longer than %d tokens", len(long), params.max_length)

    checkpoints = CHECKPOINTS / fingerprint(recipe, examples, base, start)
    forget_other_runs(checkpoints, OTHER_RUNS_KEPT)
    model = build_model(base, recipe)
    if start:
        go_on_from(model, start)
        log.info("going on from the adapter of %s", start.version)
    if set_aside := len(all_rows) - len(train_rows):
        log.info("%d rows that it has learned are not gone over again", set_aside)
    log.info("training on %d rows, %s on %s", len(examples), model.dtype, model.device)
    trained = train(
        model, examples, tokenizer.pad_token_id, recipe, checkpoints, params.checkpoint_every_steps
    )
    order = plan_batches([len(e.input_ids) for e in held_out], recipe.batch_size, 1, recipe.seed)
    batches = [lay_out([held_out[i] for i in b], tokenizer.pad_token_id, trained.share_prefix) for b in order]
    validation_loss = mean_loss(model, batches)

    save_adapter(
        model, artifacts("finetune"), learned | {row.id for row in train_rows} - {row.id for row in long}
    )
    write_text(reports("finetune") / "loss.csv", loss_csv(trained.curve))
    draw_loss(trained.curve, validation_loss, reports("finetune") / "loss.svg")
    write_json(
        reports("finetune") / "metrics.json",
        {
            "started_from": start.version if start else "base",
            "train_rows": len(examples),
            "dropped_long_rows": len(long),
            "rows_not_replayed": set_aside,
            "validation_rows": len(held_out),
            "steps": len(trained.curve),
            "train_tokens": recipe.epochs * sum(len(e.input_ids) for e in examples),
            "answer_tokens": recipe.epochs * sum(len(e.input_ids) - e.prompt_length for e in examples),
            "trained_parameters": trained.trained_parameters,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "share_prefix": trained.share_prefix,
            "fast_modules": trained.fast_modules,
            "train_loss": _running_mean([p.loss for p in trained.curve], 0.95)[-1],
            "validation_loss": validation_loss,
            "throughput": {
                "seconds": round(trained.seconds, 1),
                "tokens_per_second": round(trained.tokens / trained.seconds, 1),
                "peak_rss_mib": peak_rss_mib(),
            },
        },
    )
    shutil.rmtree(checkpoints)
    log.info(
        "%d updates in %.0f s, %.0f tokens/s, train loss %.4f, validation loss %s",
        len(trained.curve),
        trained.seconds,
        trained.tokens / trained.seconds,
        trained.curve[-1].loss,
        "-" if validation_loss is None else f"{validation_loss:.4f}",
    )


if __name__ == "__main__":
    run_stage(main)
