"""The memory that LoRA on large architectures is estimated to take, by batch; no GPU is needed.

    python -m benchmarks.gpu.memory [--tiny] [--result FILE]

The estimate is that of `finetune` (`stages/finetune/progress/memory.py`), of models whose tensors have no
values: packed rows of one length, with and without gradient checkpointing.
"""

from __future__ import annotations

import argparse
import copy
from itertools import chain, product
from typing import Any
from unittest.mock import patch

from benchmarks.gpu.models import ARCHITECTURES, make_config, make_model, make_recipe
from benchmarks.gpu.part import Note, run_part

BATCHES = ((2, 512), (4, 512), (16, 512), (8, 2048), (32, 2048))


def measure(options: argparse.Namespace, note: Note) -> dict[str, Any]:
    """Return the GiB of a training for each architecture and batch."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ARCHITECTURES}
    for name, batch in product(ARCHITECTURES, ((2, 16), (4, 64)) if options.tiny else BATCHES):
        found[name].append(_estimate(name, options.tiny, *batch))
        note(found)
    return found


def _estimate(name: str, tiny: bool, rows: int, length: int) -> dict[str, Any]:
    import torch

    from stages.common.chat.template import Encoded
    from stages.finetune.fast_lora import speed_up
    from stages.finetune.kernels.packed import use_packed
    from stages.finetune.methods.lora import add_adapter
    from stages.finetune.progress.memory import MemoryPlan

    examples = [Encoded([2 + n, *range(3, 2 + length)], length // 2) for n in range(rows)]
    model = add_adapter(make_model(make_config(name, tiny), torch.bfloat16, "meta"), make_recipe())
    use_packed(model.get_base_model())
    for module in model.modules():
        if [name for name, _ in module.named_parameters()] == ["weight"] and module.weight.dim() == 1:
            torch.nn.init.ones_(module.to_empty(device="cpu").weight)  # speed_up looks at what norms compute
    speed_up(model)
    model.get_output_embeddings().in_chunks = True
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with patch("stages.finetune.progress.memory._copy_without_values", _copy_to_cpu):
        plan = MemoryPlan(model, examples, 1, share_prefix=True)
    plan.device = torch.device("cpu")
    found: dict[str, Any] = {"rows": rows, "length": length}
    for key, checkpointing in (("gib", False), ("gib_checkpointing", True)):
        plan.checkpointing = checkpointing
        found[key] = round(plan.estimate(rows, weights).peak / 2**30, 3 if tiny else 1)
    return found


def _copy_to_cpu(model: Any, mode: Any) -> Any:
    """Return a copy of a model on the device `meta` whose tensors have no values either, but a place.

    There torch takes the attention that it has for a processor, which keeps no scores, as that of a GPU.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    memo: dict[int, Any] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        placed: Any = FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))
        is_weight = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = torch.nn.Parameter(placed, tensor.requires_grad) if is_weight else placed
    return copy.deepcopy(model, memo).train()


if __name__ == "__main__":
    run_part(__doc__, measure)
