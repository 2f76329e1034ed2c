"""LoRA on a large architecture with random weights: tokens/s, MFU, peak memory; ours, or trl with packing.

    python -m benchmarks.gpu.training --model llama-8b --who ours [--tiny] [--result FILE]

MFU is the share of the GPU's dense bfloat16 speed by its data sheet that goes into the operations that LoRA
needs: 4 for each frozen weight and token, 6 for each trained one, those of the output layer for answers only.
What gradient checkpointing computes twice, attention's own products and padding do not count, for nobody. The
time is that of the whole training, its first step included.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
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
from benchmarks.gpu.part import CannotRun, need_gpu, run_part

# Of data sheets: dense bfloat16, floating-point operations a second. H100 and H200 have the same chip.
SHEET = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12}
LONGEST = 2048
BATCH_TOKENS = 8192  # of trl: as many as a batch of ours has on the average
WHO = ("ours", "ours-compiled", "trl", "trl-checkpointing")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train, and return what it took."""
    import torch

    from stages.common.machine.products import measure_product_speed
    from stages.common.model.loading import pick_dtype
    from stages.finetune.progress.flops import count_work

    device = need_gpu(options.tiny)
    dtype = pick_dtype(device, "auto")
    config = make_config(options.model, options.tiny)
    longest = 128 if options.tiny else LONGEST
    rows = make_rows(2000 if options.tiny else options.tokens, config.vocab_size, longest)
    tokens, answers = sum(len(r.input_ids) for r in rows), sum(r.learned_count for r in rows)
    limit = measure_product_speed(str(dtype).removeprefix("torch."), device.type)
    model = make_model(config, dtype, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if options.who.startswith("ours"):
        model, found = train_ours(model, rows, options)
    else:
        model, found = train_trl(model, rows, longest, options.who == "trl-checkpointing")
    speed = count_work(model).count(tokens, answers) / found["seconds"]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    sheet = next((peak for part, peak in SHEET.items() if part in name), None)
    cuda = device.type == "cuda"
    return {
        "who": options.who,
        "device": name,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": tokens,
        "tokens_per_second": round(tokens / found["seconds"], 1),
        "mfu": round(speed / sheet, 4) if sheet else None,
        "product_share": round(speed / limit, 4),
        "product_limit_tflops": round(limit / 1e12, 2),
        "peak_memory_mib": torch.cuda.max_memory_reserved(device) >> 20 if cuda else None,
        **found,
    }


def train_ours(model: Any, rows: Any, options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Train with the stage's own code."""
    from stages.finetune.methods.lora import add_adapter
    from stages.finetune.objectives.answers import Answers
    from stages.finetune.trainer import train

    recipe = make_recipe(batch_size=4 if options.tiny else options.batch_size)
    model = add_adapter(model, recipe)
    if options.who == "ours-compiled":
        for name, module in model.named_modules():
            if name.endswith(".mlp"):
                module.compile(dynamic=True)
    with tempfile.TemporaryDirectory() as folder:
        result = train(model, Answers(rows), [], 1, recipe, Path(folder), checkpoint_every_steps=1_000_000)
    return model, {
        "seconds": round(result.seconds, 2),
        "train_loss": round(result.train_loss, 4),
        "updates": len(result.curve),
        "packed": result.packed,
        "gradient_checkpointing": result.gradient_checkpointing,
        "fast_modules": result.fast_modules,
        "estimated_peak_mib": result.cost.to_metrics()["estimated_peak_mib"],
    }


def train_trl(model: Any, rows: Any, longest: int, checkpointing: bool) -> tuple[Any, dict[str, Any]]:
    """Train the same LoRA with `SFTTrainer`: packing, and the fastest attention that is installed.

    Raises:
        CannotRun: trl is not installed.
    """
    if importlib.util.find_spec("trl") is None:
        raise CannotRun("trl is not installed here")
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    recipe, cuda = make_recipe(), model.device.type == "cuda"
    if cuda and importlib.util.find_spec("flash_attn") is not None:
        model.set_attn_implementation("flash_attention_2")
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
                packing=True,
                max_length=longest,
                completion_only_loss=True,
                per_device_train_batch_size=max(1, BATCH_TOKENS // LONGEST),
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
        )
        started = time.monotonic()
        result = trainer.train()
        seconds = time.monotonic() - started
    return trainer.model, {
        "seconds": round(seconds, 2),
        "train_loss": round(result.training_loss, 4),
        "updates": result.global_step,
        "gradient_checkpointing": checkpointing,
        "attention": model.config._attn_implementation,
    }


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=sorted(ARCHITECTURES), required=True)
    parser.add_argument("--who", choices=WHO, required=True)
    parser.add_argument("--tokens", type=int, default=200_000, help="to train on")
    parser.add_argument("--batch-size", type=int, default=16, help="rows of a batch of ours")


if __name__ == "__main__":
    run_part(__doc__, measure, _add_arguments)
