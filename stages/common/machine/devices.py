"""What a host can train on, and whether that is enough for what params.yaml asks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from stages.common.errors import InputError
from stages.common.model.loading import pick_device


@dataclass(frozen=True, slots=True)
class Host:
    """What this host can train on.

    Attributes:
        kind: of its devices, as torch names it: cuda, mps or cpu.
        count: of its GPUs; without one, of the cores that this process may use.
        name: of the host, in a message.
    """

    kind: str
    count: int
    name: str = "this host"

    def describe(self) -> str:
        """Return what the host has, in words."""
        if self.kind == "cpu":
            return f"no GPU and {self.count} {'core' if self.count == 1 else 'cores'}"
        return f"{self.count} {'GPU' if self.count == 1 else 'GPUs'} ({self.kind})"


def inspect_host() -> Host:
    """Return what this host can train on; `CUDA_VISIBLE_DEVICES` hides GPUs from it."""
    import torch

    kind = pick_device().type
    if kind == "cuda":
        return Host(kind, torch.cuda.device_count())
    if kind == "cpu":
        # A container or taskset may allow fewer cores than there are; macOS cannot tell.
        can_tell = hasattr(os, "sched_getaffinity")
        return Host(kind, len(os.sched_getaffinity(0)) if can_tell else os.cpu_count() or 1)
    return Host(kind, 1)


def find_nvml_device() -> tuple[Any, Any]:
    """Return the module of NVIDIA's management library, and its handle of the GPU that torch uses.

    Raises:
        Exception: there is none, or it cannot tell: no driver, an old GPU, a GPU in parts.
    """
    import pynvml  # type: ignore[import-untyped]
    import torch

    pynvml.nvmlInit()
    uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)


def read_gpu_watts() -> float | None:
    """Return the most power that the GPU that torch uses is allowed; None where it cannot tell."""
    try:
        nvml, handle = find_nvml_device()
        return float(nvml.nvmlDeviceGetEnforcedPowerLimit(handle)) / 1000.0
    except Exception:  # as above
        return None


def check_devices(wanted: int, host: Host, reason: str) -> None:
    """Refuse more processes than the host has devices.

    Raises:
        InputError: with what the host has.
    """
    if wanted > host.count:
        raise InputError(
            f"{reason}, and {host.name} has {host.describe()}",
            f"at most {host.count}, or finetune.devices: auto; CUDA_VISIBLE_DEVICES can hide GPUs",
        )


def check_batch_size(batch_size: int, processes: int) -> None:
    """Refuse a batch that has no row for some process.

    Raises:
        InputError: with both numbers.
    """
    if batch_size < processes:
        raise InputError(
            f"finetune.batch_size is {batch_size}, and {processes} processes share each batch: "
            "some would have no row",
            f"set finetune.batch_size to at least {processes} (and lower finetune.gradient_accumulation by "
            f"as much), or train with at most {batch_size} processes",
        )
