"""Are packed rows, the output layer in parts and layers computed twice right on this device?

    python -m benchmarks.gpu.numerics [--tiny] [--result FILE]

Compares the gradients of a small random model, whose heads are as wide as those of large ones, with the plain
path in float32. In bfloat16 both paths round; the faster one may be off by no more than twice as much.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.gpu.models import make_config, make_model, make_recipe, make_rows
from benchmarks.gpu.part import Note, need_gpu, run_part


def measure(options: argparse.Namespace, _: Note) -> dict[str, Any]:
    """Return the relative differences of the gradients, and whether they are those of rounding."""
    import torch

    from stages.common.model.loading import pick_dtype

    device = need_gpu(options.tiny)
    dtype = pick_dtype(device, "auto")
    exact = _compute(device, torch.float32, "plain")
    found = {way: _compute(device, dtype, way) for way in ("plain", "fast", "twice")}
    errors = {way: float((one - exact).norm() / exact.norm()) for way, one in found.items()}
    allowed = max(2 * errors["plain"], 1e-4)
    wrong = [way for way, error in errors.items() if not error <= allowed]
    if wrong:
        raise RuntimeError(f"gradients are wrong, not only rounded: {', '.join(wrong)} of {errors}")
    return {"dtype": str(dtype).removeprefix("torch."), "gradient_errors": errors, "allowed": allowed}


def _compute(device: Any, dtype: Any, way: str) -> Any:
    """Return the gradient of all adapter weights, in float32."""
    import torch

    from stages.common.model.replaced import list_trained
    from stages.finetune.answer_loss import sum_answer_loss
    from stages.finetune.kernels.checkpointing import checkpoint_layers
    from stages.finetune.methods.lora import add_adapter
    from stages.finetune.shared_prefix import lay_out
    from stages.finetune.speedups import is_packed, speed_up_training

    config = make_config("llama-8b", tiny=True, head_dim=128)
    rows = make_rows(4000, config.vocab_size, 256)
    model = add_adapter(make_model(config, dtype, device), make_recipe()).train()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for weights in list_trained(model).values():
            noise = torch.randn(weights.shape, generator=generator)
            weights.copy_(0.02 * noise.to(weights.device, weights.dtype))
    share = False if way == "plain" else speed_up_training(model, rows, 1)[0]
    if way != "plain" and not share:
        raise RuntimeError("the faster code was refused: its loss differs")
    if way == "twice":
        checkpoint_layers(model)
    batch = lay_out(rows[:12], 1, share, is_packed(model)).to(device)
    sum_answer_loss(model, batch).backward()
    return torch.cat(
        [w.grad.float().flatten().cpu() for w in list_trained(model).values() if w.grad is not None]
    )


if __name__ == "__main__":
    run_part(__doc__, measure)
