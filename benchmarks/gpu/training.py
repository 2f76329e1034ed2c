"""LoRA on a large architecture with random weights: tokens/s, MFU, peak memory; ours, or trl.

    python -m benchmarks.gpu.training --model llama-8b --who ours [--tiny] [--result FILE]

MFU is the share of the GPU's dense bfloat16 speed by its data sheet that goes into the operations that LoRA
needs: 4 for each frozen weight and token, 6 for each trained one, those of the output layer for answers only.
What gradient checkpointing computes twice, attention's own products and padding do not count, for nobody.
Speed and MFU are of all updates but the first two, which compile and make room; `seconds` has them too. Of
trl several settings are tried, each again with gradient checkpointing if it runs out of memory; the fastest
counts. `ours-compiled` is not what the pipeline runs: it shows what compiling the MLPs would bring.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.models import (
    ARCHITECTURES,
    make_config,
    make_model,
    make_recipe,
    make_rows,
    make_tokenizer,
)
from benchmarks.gpu.part import CannotRun, Note, need_gpu, run_part

# Of data sheets: dense bfloat16, floating-point operations a second. H100 and H200 have the same chip.
SHEET = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12}
LONGEST = 2048
UPDATE_BINS = 4  # of trl: so many times the longest row are about the tokens of a batch of ours
FIRST = 2  # updates that do not count
WHO = ("ours", "ours-compiled", "trl")
Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """How trl trains.

    Attributes:
        batch: rows, or bins of packed rows; updates are of `UPDATE_BINS`.
        pads: whether batches are filled up to one length, so that what is compiled is compiled once.
    """

    attention: str
    packing: bool
    batch: int
    pads: bool = False


# torch's attention has the whole square of a batch as its mask, so it gets one bin at a time.
TRL = {
    "packing, one bin at a time": Setting("sdpa", True, 1),
    "packing, flex": Setting("flex_attention", True, UPDATE_BINS, pads=True),
    "packing, flash": Setting("flash_attention_2", True, UPDATE_BINS),
    "rows of like length": Setting("sdpa", False, UPDATE_BINS),
}


@dataclass(slots=True)
class Steps:
    """Tokens and answer tokens of each update, and when it ended."""

    tokens: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)

    def read_steady(self) -> tuple[int, int, float]:
        """Return tokens, answer tokens and seconds of all updates but the first.

        Raises:
            RuntimeError: there are no others.
        """
        if len(self.ends) <= FIRST or len(self.ends) != len(self.tokens):
            raise RuntimeError(f"{len(self.ends)} updates of {len(self.tokens)} batches: no speed to measure")
        seconds = self.ends[-1] - self.ends[FIRST - 1]
        return sum(self.tokens[FIRST:]), sum(self.answers[FIRST:]), seconds


def measure(options: argparse.Namespace, note: Note) -> Figures:
    """Train with each setting, and return what it took."""
    from stages.common.machine.products import measure_product_speed
    from stages.common.model.loading import pick_dtype

    device = need_gpu(options.tiny)
    if options.who == "trl" and importlib.util.find_spec("trl") is None:
        raise CannotRun("trl is not installed here")
    dtype = pick_dtype(device, "auto")
    config = make_config(options.model, options.tiny)
    longest = 128 if options.tiny else LONGEST
    rows = make_rows(3000 if options.tiny else options.tokens, config.vocab_size, longest)
    limit = measure_product_speed(str(dtype).removeprefix("torch."), device.type)
    ways: dict[str, Callable[[Any], Trained]] = (
        {name: _bind_trl(rows, longest, setting) for name, setting in TRL.items()}
        if options.who == "trl"
        else {options.who: lambda model: train_ours(model, rows, options)}
    )
    found: Figures = {
        "who": options.who,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": sum(len(row.input_ids) for row in rows),
        "product_limit_tflops": round(limit / 1e12, 2),
        "tried": {},
    }
    for name, way in ways.items():
        found["tried"][name] = _try(way, lambda: make_model(config, dtype, device), limit)
        note(found)
    if not any("tokens_per_second" in one for one in found["tried"].values()):
        raise RuntimeError(f"nothing trained: {found['tried']}")
    return found


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained model, its updates, and what else there is to tell."""

    model: Any
    steps: Steps
    about: Figures


def _try(way: Callable[[Any], Trained], make: Callable[[], Any], limit: float) -> Figures:
    """Return the figures of a training, or the reason for none: the others are to be tried too."""
    import torch

    _free()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        return _read(way(make()), limit)
    except CannotRun as error:
        return {"reason": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"reason": f"{type(error).__name__}: {error}"[:500]}


def _free() -> None:
    """Give back what an earlier training held."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _read(trained: Trained, limit: float) -> Figures:
    """Return speed, shares and memory."""
    import torch

    from stages.finetune.progress.flops import count_work

    device = trained.model.device
    cuda = device.type == "cuda"
    tokens, answers, seconds = trained.steps.read_steady()
    speed = count_work(trained.model).count(tokens, answers) / seconds
    name = torch.cuda.get_device_name(device) if cuda else "CPU"
    sheet = next((peak for part, peak in SHEET.items() if part in name), None)
    return {
        "device": name,
        "parameters": sum(p.numel() for p in trained.model.parameters()),
        "tokens": sum(trained.steps.tokens),
        "updates": len(trained.steps.ends),
        "tokens_per_second": round(tokens / seconds, 1),
        "mfu": round(speed / sheet, 4) if sheet else None,
        "product_share": round(speed / limit, 4),
        "peak_memory_mib": torch.cuda.max_memory_reserved(device) >> 20 if cuda else None,
        **trained.about,
    }


def train_ours(model: Any, rows: Any, options: argparse.Namespace) -> Trained:
    """Train with the stage's own code."""
    from stages.finetune.methods.lora import add_adapter
    from stages.finetune.objectives.answers import Answers
    from stages.finetune.trainer import train

    steps = Steps()

    class Timed(Answers):
        def compute_loss(self, model: Any, batch: Any) -> Any:
            steps.tokens.append(sum(self.lengths[row] for row in batch.rows))
            steps.answers.append(sum(batch.learned))
            return super().compute_loss(model, batch)

        def take_figures(self) -> dict[str, float]:
            steps.ends.append(time.monotonic())  # asked for once the loss of an update has been read
            return super().take_figures()

    recipe = make_recipe(batch_size=4 if options.tiny else options.batch_size)
    model = add_adapter(model, recipe)
    if options.who == "ours-compiled":
        for name, module in model.named_modules():
            if name.endswith(".mlp"):
                module.compile(dynamic=True)
    with tempfile.TemporaryDirectory() as folder:
        result = train(model, Timed(rows), [], 1, recipe, Path(folder), checkpoint_every_steps=1_000_000)
    about = {
        "seconds": round(result.seconds, 2),
        "train_loss": round(result.train_loss, 4),
        "attention": "packed rows" if result.packed else model.config._attn_implementation,
        "packed": result.packed,
        "gradient_checkpointing": result.gradient_checkpointing,
        "fast_modules": result.fast_modules,
        "estimated_peak_mib": result.cost.to_metrics()["estimated_peak_mib"],
    }
    return Trained(model, steps, about)


def _bind_trl(rows: Any, longest: int, setting: Setting) -> Callable[[Any], Trained]:
    def train(model: Any) -> Trained:
        import torch

        config, dtype, device = model.config, model.dtype, model.device
        try:
            return train_trl(model, rows, longest, setting, checkpointing=False)
        except torch.OutOfMemoryError as error:
            print(f"once more with gradient checkpointing: {error}", file=sys.stderr)
        del model
        _free()
        torch.cuda.reset_peak_memory_stats()
        return train_trl(make_model(config, dtype, device), rows, longest, setting, checkpointing=True)

    return train


def train_trl(model: Any, rows: Any, longest: int, setting: Setting, checkpointing: bool) -> Trained:
    """Train the same LoRA with `SFTTrainer`.

    Raises:
        CannotRun: the attention cannot be trained here.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    recipe, cuda = make_recipe(), model.device.type == "cuda"
    if setting.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise CannotRun("flash_attn is not installed here")
    if setting.attention == "flex_attention" and not cuda:
        raise CannotRun("flex_attention has no backward pass on a CPU")
    model.set_attn_implementation(setting.attention)
    steps, batches = Steps(), list[tuple[int, int]]()

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            steps.ends.append(time.monotonic())

    data = Dataset.from_list(
        [
            {
                "input_ids": row.input_ids,
                "completion_mask": [0] * row.prompt_length + [1] * (len(row.input_ids) - row.prompt_length),
            }
            for row in rows
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            processing_class=make_tokenizer(512),
            args=SFTConfig(
                output_dir=folder,
                num_train_epochs=1,
                packing=setting.packing,
                max_length=longest,
                pad_to_multiple_of=setting.batch * longest if setting.pads else None,
                train_sampling_strategy="random" if setting.packing else "group_by_length",
                completion_only_loss=True,
                per_device_train_batch_size=setting.batch,
                gradient_accumulation_steps=UPDATE_BINS // setting.batch,
                gradient_checkpointing=checkpointing,
                learning_rate=recipe.learning_rate,
                bf16=cuda,
                use_cpu=not cuda,
                report_to="none",
                save_strategy="no",
                logging_steps=1,
                disable_tqdm=True,
            ),
            train_dataset=data,
            peft_config=LoraConfig(
                r=recipe.rank,
                lora_alpha=recipe.alpha,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
            callbacks=[Clock()],
        )
        collate = trainer.data_collator

        def count(examples: Sequence[Any]) -> Any:
            ids = [one["input_ids"] for one in examples]
            learned = sum(label >= 0 for one in examples for label in one["labels"])
            batches.append((sum(map(len, ids)), learned))
            return collate(examples)

        trainer.data_collator = count
        started = time.monotonic()
        result = trainer.train()
        seconds = time.monotonic() - started
    for first in range(0, len(batches), UPDATE_BINS // setting.batch):
        update = batches[first : first + UPDATE_BINS // setting.batch]
        steps.tokens.append(sum(tokens for tokens, _ in update))
        steps.answers.append(sum(answers for _, answers in update))
    about = {
        "seconds": round(seconds, 2),
        "train_loss": round(result.training_loss, 4),
        "attention": trainer.model.config._attn_implementation,
        "gradient_checkpointing": checkpointing,
    }
    return Trained(trainer.model, steps, about)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=sorted(ARCHITECTURES), required=True)
    parser.add_argument("--who", choices=WHO, required=True)
    parser.add_argument("--tokens", type=int, default=80_000, help="to train on")
    parser.add_argument("--batch-size", type=int, default=16, help="rows of a batch of ours")


if __name__ == "__main__":
    run_part(__doc__, measure, _add_arguments)
