"""The speed of matrix products on this machine, which no training step can exceed."""

from __future__ import annotations

import time

PROBE_S = 0.5
# Tokens of a batch, and a layer: of the default base model on a CPU, large enough to fill a GPU.
CPU_SIZES = (600, 576, 1536)
GPU_SIZES = (8192, 4096, 8192)


def measure_product_speed(dtype: str, device: str = "cpu", seconds: float = PROBE_S) -> float:
    """Return the floating-point operations a second of matrix products in a number format.

    On a GPU the products are large; on a CPU they are those of the default base model, whose speed larger
    ones do not exceed by much.
    """
    import torch

    rows, inputs, outputs = CPU_SIZES if device == "cpu" else GPU_SIZES
    kind = getattr(torch, dtype)
    x = torch.ones(rows, inputs, dtype=kind, device=device)
    weight = torch.ones(outputs, inputs, dtype=kind, device=device)
    for _ in range(3):  # the first ones make kernels
        torch.nn.functional.linear(x, weight)
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        for _ in range(10):
            y = torch.nn.functional.linear(x, weight)
        float(y[0, 0])  # waits for a GPU
        count += 10
    return 2.0 * rows * inputs * outputs * count / elapsed
