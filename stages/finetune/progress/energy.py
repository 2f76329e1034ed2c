"""The energy that a training takes: read from the machine's own counters, or assumed from watts.

Processors count it in RAPL (Linux: /sys/class/powercap, mostly readable by root only), NVIDIA's GPUs in NVML.
Both count everything that runs on them meanwhile. Nothing is sent anywhere (ADR 0019).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RAPL = Path("/sys/class/powercap")
PACKAGES = "intel-rapl:[0-9]*"  # AMD's processors have the same name; `intel-rapl:0:0` is a part of `:0`
JOULES_PER_WATT_HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Energy:
    """What a training took.

    Attributes:
        watt_hours: None where it is not known.
        source: where the number is from, in words.
    """

    watt_hours: float | None
    source: str


class EnergyMeter:
    """Measures from its creation on.

    Args:
        device: the type of the device that computes.
        watts: assumed of the machine where no counter can be read; None: not known.
        rapl: the folder of the processors' counters.
    """

    def __init__(self, device: str, watts: float | None = None, rapl: Path = RAPL) -> None:
        self._watts = watts
        self._started = time.monotonic()
        self._counters: dict[str, Callable[[], float]] = {}
        if processors := _find_packages(rapl):
            self._counters["RAPL"] = _Rapl(processors).read_joules
        gpu = _find_gpu_counter() if device == "cuda" else None
        if gpu:
            self._counters["NVML"] = gpu
        self._is_whole = bool(processors) and (device != "cuda" or gpu is not None)
        self._before = {name: read() for name, read in self._counters.items()}

    def read(self) -> Energy:
        """Return the energy since the start."""
        seconds = time.monotonic() - self._started
        joules = {name: read() - self._before[name] for name, read in self._counters.items()}
        named = " and ".join(joules)
        if self._is_whole:
            return Energy(sum(joules.values()) / JOULES_PER_WATT_HOUR, f"measured: {named}")
        if self._watts is not None:
            watt_hours = self._watts * seconds / JOULES_PER_WATT_HOUR
            return Energy(watt_hours, f"assumed: {self._watts:g} W (flows.training.power_watts)")
        if joules:
            return Energy(sum(joules.values()) / JOULES_PER_WATT_HOUR, f"measured: {named} only")
        return Energy(None, "not known: no counter can be read, and flows.training.power_watts is null")


class _Rapl:
    """The counters of the processors, which begin again at 0 after some minutes or hours."""

    def __init__(self, packages: list[Path]) -> None:
        self._packages = packages
        self._ranges = [_read_number(path / "max_energy_range_uj") for path in packages]
        self._last = [_read_number(path / "energy_uj") for path in packages]
        self._total = 0

    def read_joules(self) -> float:
        now = [_read_number(path / "energy_uj") for path in self._packages]
        for value, last, size in zip(now, self._last, self._ranges, strict=True):
            self._total += value - last if value >= last else value + size - last
        self._last = now
        return self._total / 1e6


def _find_packages(rapl: Path) -> list[Path]:
    """Return the counters of whole processors that this user may read."""
    found = []
    for path in sorted(rapl.glob(PACKAGES)):
        try:
            _read_number(path / "energy_uj")
            _read_number(path / "max_energy_range_uj")
        except (OSError, ValueError):
            continue
        if path.name.count(":") == 1:
            found.append(path)
    return found


def _read_number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))


def _find_gpu_counter() -> Callable[[], float] | None:
    """Return a function that reads the joules of the GPU that torch uses; None where it has no counter."""
    try:
        import pynvml  # type: ignore[import-untyped]
        import torch

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        handle: Any = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no driver, an old GPU, a GPU in parts: whatever it is, there is no counter
        return None
    return lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000.0
