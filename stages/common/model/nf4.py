"""Base models in 4 bits (method qlora): where they can be trained, and what they take."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from stages.common.errors import InputError
from stages.common.logs import show_packages

# Of a weight: 4 bits, a scale of 8 bits for 64 of them, and one of 32 bits for 256 scales.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
DEVICES = ("cuda", "cpu")


def check_nf4(config: Any, device: str) -> None:
    """Check that a base model can be trained in 4 bits here, and let libraries find what that takes.

    Args:
        device: on which it is trained: `cuda`, `mps` or `cpu`.

    Raises:
        InputError: with what is missing.
    """
    show_packages(["bitsandbytes"])
    if find_spec("bitsandbytes") is None:
        raise InputError(
            "finetune.method is qlora, and bitsandbytes is not installed",
            "pip install --constraint requirements.lock 'perennial[qlora]', or set finetune.method: lora",
        )
    if device not in DEVICES:
        raise InputError(
            f"finetune.method is qlora, and this machine trains on {device}",
            "train on a GPU of NVIDIA or a CPU, or set finetune.method: lora",
        )
    if getattr(config, "quantization_config", None):
        raise InputError(
            "finetune.method is qlora, and the weights of the base model are quantized already",
            "choose a base model that is not quantized, or set finetune.method: lora",
        )


def count_numbers(weights: Any) -> int:
    """Return how many numbers a tensor of weights holds; of one in 4 bits, two in each byte."""
    state = getattr(weights, "quant_state", None)
    return int(weights.numel() if state is None else state.shape.numel())
