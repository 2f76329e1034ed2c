"""trl and LLaMA-Factory as contestants of `benchmarks.training`: the same LoRA on the same token ids."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.common.chat.template import Encoded
from stages.common.machine.memory import MIB, read_peak_memory
from stages.finetune.recipe import Recipe

IGNORED = -100  # the label of a token that is not learned, in transformers
INSTALL_S = 900.0
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# What is tried for the best settings: torch's attention or plain products, and packed rows.
SETTINGS: dict[str, dict[str, Any]] = {
    "trl sdpa": {"attention": "sdpa"},
    "trl eager": {"attention": "eager"},
    "trl packing": {"attention": "sdpa", "packing": True},
}
LLAMA_FACTORY: dict[str, dict[str, Any]] = {
    "LLaMA-Factory sdpa": {"flash_attn": "sdpa"},
    "LLaMA-Factory eager": {"flash_attn": "disabled"},
}
Figures = dict[str, float]


class NotInstalled(Exception):
    """Raised if a peer cannot be installed; the message has the reason."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What all train on."""

    base: Path
    pad_id: int
    rows: Sequence[Encoded]
    validation: Sequence[Encoded]
    recipe: Recipe

    @property
    def targets(self) -> str | list[str]:
        """The modules with an adapter, as peft takes them."""
        return (
            self.recipe.target_modules
            if isinstance(self.recipe.target_modules, str)
            else [*self.recipe.target_modules]
        )


def make_figures(inputs: Inputs, seconds: float, loss: float) -> Figures:
    """Return the figures that all have."""
    tokens = sum(len(row.input_ids) for row in inputs.rows)
    return {
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1),
        "loss": round(loss, 5),
        "peak_rss_mib": read_peak_memory() // MIB,
    }


def label(row: Encoded) -> list[int]:
    """Return the labels of a row: its learned tokens, and nothing elsewhere."""
    labels = [IGNORED] * len(row.input_ids)
    for start, end in row.learned:
        labels[start:end] = row.input_ids[start:end]
    return labels


def compute_loss(model: Any, inputs: Inputs) -> float:
    """Return the loss of the held-out rows, by the code that measures ours."""
    from stages.finetune.answer_loss import compute_mean_loss
    from stages.finetune.shared_prefix import lay_out

    size = inputs.recipe.batch_size
    rows = inputs.validation
    batches = (
        lay_out(rows[i : i + size], inputs.pad_id, share_prefix=False) for i in range(0, len(rows), size)
    )
    found = compute_mean_loss(model, batches)
    assert found is not None
    return found


def run_trl(inputs: Inputs, settings: dict[str, Any] | None) -> Figures:
    """Train with `SFTTrainer`; settings None: its defaults, but for one pass and a CPU."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    recipe = inputs.recipe
    own: dict[str, Any] = {}
    kwargs: dict[str, Any] = {}
    if settings is not None:
        own = {
            "per_device_train_batch_size": recipe.batch_size,
            "gradient_accumulation_steps": recipe.gradient_accumulation,
            "learning_rate": recipe.learning_rate,
            "lr_scheduler_type": recipe.schedule,
            "warmup_steps": recipe.warmup_fraction,  # below 1: a share of all
            "adam_beta2": recipe.adam_beta2,
            "max_grad_norm": recipe.max_grad_norm,
            "gradient_checkpointing": False,
            "bf16": recipe.dtype == "bfloat16",
            "packing": settings.get("packing", False),
            "max_length": max(len(row.input_ids) for row in inputs.rows),
            "logging_steps": 1000,
        }
        kwargs = {"dtype": getattr(torch, recipe.dtype), "attn_implementation": settings["attention"]}
    model = AutoModelForCausalLM.from_pretrained(inputs.base, **kwargs)
    data = [
        {"input_ids": row.input_ids, "completion_mask": [int(one != IGNORED) for one in label(row)]}
        for row in inputs.rows
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            processing_class=AutoTokenizer.from_pretrained(inputs.base),
            args=SFTConfig(
                output_dir=folder,
                num_train_epochs=1,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                completion_only_loss=True,
                # Without a GPU it refuses its default of bfloat16 unless it is told so.
                use_cpu=not torch.cuda.is_available(),
                **own,
            ),
            train_dataset=Dataset.from_list(data),
            peft_config=LoraConfig(
                r=recipe.rank,
                lora_alpha=recipe.alpha,
                target_modules=inputs.targets,
                task_type="CAUSAL_LM",
            ),
        )
        started = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - started
    return make_figures(inputs, seconds, compute_loss(trainer.model, inputs))


def make_llamafactory(folder: Path) -> str:
    """Make an environment with LLaMA-Factory; return its python.

    Raises:
        NotInstalled: no index has it, or the time is over.
    """
    python = folder / "bin" / "python"
    steps = (
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", "--upgrade", "pip"],
        [
            *(str(python), "-m", "pip", "install", "--quiet", "--no-compile"),
            *("--extra-index-url", os.environ.get("TORCH_CPU_INDEX", TORCH_CPU_INDEX), "llamafactory"),
        ],
    )
    for command in steps:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=INSTALL_S)
        except subprocess.TimeoutExpired:
            raise NotInstalled(f"not measured: not installed after {INSTALL_S:.0f} s") from None
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
            raise NotInstalled(f"not measured: pip cannot install it here: {lines[-1]}")
    return str(python)


def run_llamafactory(inputs: Inputs, settings: dict[str, Any], python: str) -> Figures:
    """Train with LLaMA-Factory's own command in its own environment, on rows that are tokenized already.

    Raises:
        RuntimeError: its command failed; the message has the end of its output.
    """
    import torch
    from datasets import Dataset, DatasetDict
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    recipe = inputs.recipe
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = [
            {"input_ids": row.input_ids, "attention_mask": [1] * len(row.input_ids), "labels": label(row)}
            for row in inputs.rows
        ]
        DatasetDict({"train": Dataset.from_list(data)}).save_to_disk(str(folder / "rows"))
        config = {
            "stage": "sft",
            "do_train": True,
            "model_name_or_path": str(inputs.base.resolve()),
            "dataset": "rows",  # it wants one named, and reads the tokenized one
            "tokenized_path": str(folder / "rows"),
            "template": "empty",
            "finetuning_type": "lora",
            "lora_rank": recipe.rank,
            "lora_alpha": recipe.alpha,
            "lora_dropout": 0.0,
            "lora_target": "all" if inputs.targets == "all-linear" else ",".join(inputs.targets),
            "output_dir": str(folder / "out"),
            "num_train_epochs": 1,
            "per_device_train_batch_size": recipe.batch_size,
            "gradient_accumulation_steps": recipe.gradient_accumulation,
            "learning_rate": recipe.learning_rate,
            "lr_scheduler_type": recipe.schedule,
            "warmup_ratio": recipe.warmup_fraction,
            "adam_beta2": recipe.adam_beta2,
            "max_grad_norm": recipe.max_grad_norm,
            "bf16": recipe.dtype == "bfloat16",
            "use_cpu": not torch.cuda.is_available(),
            "disable_gradient_checkpointing": True,
            "report_to": "none",
            "save_strategy": "no",
            "seed": recipe.seed,
            **settings,
        }
        (folder / "train.yaml").write_text(json.dumps(config), encoding="utf-8")
        # Its own packages, not those of this process.
        environment = {**os.environ, "PYTHONPATH": "", "DISABLE_VERSION_CHECK": "1"}
        command = [str(Path(python).with_name("llamafactory-cli")), "train", str(folder / "train.yaml")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise RuntimeError((done.stdout + done.stderr)[-1500:])
        taken = json.loads((folder / "out" / "train_results.json").read_text(encoding="utf-8"))
        model = AutoModelForCausalLM.from_pretrained(inputs.base, dtype=getattr(torch, recipe.dtype))
        tuned = PeftModel.from_pretrained(model, str(folder / "out"))
        figures = make_figures(inputs, float(taken["train_runtime"]), compute_loss(tuned, inputs))
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # the command's, which holds more
        return figures | {"peak_rss_mib": peak >> 10}
