"""Checkpoints of what is trained, whole: any number of processes resumes from them, shared model or not."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from stages.common.model.adapter import PEFT, REPLACED
from stages.common.model.replaced import list_trained, put_weights, read_weights, write_weights
from stages.finetune.devices.sharding import (
    cut_optimizer_state,
    gather_optimizer_state,
    gather_trained,
    is_sharded,
    put_adapter,
)


class WholeCheckpointTrainer(Trainer):
    """A Trainer that writes what is trained and its averages as one process has them that trains alone.

    Of a shared model the first process holds them whole in main memory while it writes.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        # Then Trainer puts the model into no DDP. At loading it would say that no such model can be resumed.
        self.is_distributed_loading_by_transformers = is_sharded(self.model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained; of a shared model all processes bring their parts."""
        whole = gather_trained(self.model) if is_sharded(self.model) else None
        if self.args.should_save:
            self._save(output_dir, whole)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write what is trained; without peft, Trainer would write the frozen weights, too."""
        if isinstance(self.model, PeftModel):
            super()._save(output_dir, state_dict)
        else:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            write_weights(state_dict or list_trained(self.model), folder / REPLACED.weights)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if not isinstance(self.model, PeftModel):
            put_weights(self.model, read_weights(folder / REPLACED.weights), folder / REPLACED.weights)
        elif is_sharded(self.model):
            put_adapter(self.model, read_weights(folder / PEFT.weights))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write the state as one process has it that trains alone, so that any number of them resumes."""
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = gather_optimizer_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        state = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=True)
        self.optimizer.load_state_dict(cut_optimizer_state(state, self.optimizer))
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))

    def _defer_fsdp_gradient_reduction(self) -> AbstractContextManager[None]:
        """Sum gradients after each batch: until the update, whole ones would fill what sharing saves."""
        return nullcontext()
