"""The energy that a training takes: read from the machine's own counters, or assumed from watts.

Processors count it in RAPL (Linux: /sys/class/powercap, mostly readable by root only), NVIDIA's GPUs in NVML.
Both count everything that runs on them meanwhile. Of several processes each reads its own GPU, and one of
each host the host's processors. Nothing is sent anywhere (ADR 0019).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.common.machine.devices import find_nvml_device
from stages.finetune.devices.group import gather, is_first_of_host

RAPL = Path("/sys/class/powercap")
PACKAGES = "intel-rapl:[0-9]*"  # AMD's processors have the same name; `intel-rapl:0:0` is a part of `:0`
JOULES_PER_WATT_HOUR = 3600.0
THEN = "; then "  # between the sources of parts of a training
PART = ", of a part of the training only"  # the rest is not known
COUNTED = {"RAPL": "hosts", "NVML": "GPUs"}  # what each counter is one of


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
    """Measures what this process computes on, from its creation on.

    Args:
        device: the type of the device that computes.
        watts: assumed of the machine where no counter can be read; None: not known.
        rapl: the folder of the processors' counters.
    """

    def __init__(self, device: str, watts: float | None = None, rapl: Path = RAPL) -> None:
        self._watts = watts
        self._started = time.monotonic()
        self._counters: dict[str, Callable[[], float] | None] = {}
        if is_first_of_host():
            processors = _find_packages(rapl)
            self._counters["RAPL"] = _Rapl(processors).read_joules if processors else None
        if device == "cuda":
            self._counters["NVML"] = _find_gpu_counter()
        self._before = self._read_counters()

    def read(self) -> dict[str, float | None]:
        """Return the joules since the start by counter; None for one that cannot be read."""
        return {
            name: None if joules is None else joules - (self._before[name] or 0.0)
            for name, joules in self._read_counters().items()
        }

    def measure(self) -> Energy:
        """Return the energy of all processes since the start; all must call it."""
        return add_up(gather(self.read()), self._watts, time.monotonic() - self._started)

    def _read_counters(self) -> dict[str, float | None]:
        return {name: read() if read else None for name, read in self._counters.items()}


def add_up(parts: Sequence[Mapping[str, float | None]], watts: float | None, seconds: float) -> Energy:
    """Return the energy of a training.

    Args:
        parts: the joules that each process read, by counter; None for one that it could not read.
        watts: assumed of each host where a counter is missing.
    """
    values: defaultdict[str, list[float | None]] = defaultdict(list)
    for part in parts:
        for name, joules in part.items():
            values[name].append(joules)
    found = {name: [one for one in all_of_it if one is not None] for name, all_of_it in values.items()}
    is_whole = all(len(found[name]) == len(values[name]) for name in values)
    if not is_whole and watts is not None:
        hosts = len(values["RAPL"])  # which one process of each host looks for
        joules_of_all = hosts * watts * seconds
        each = f"{hosts} times " if hosts > 1 else ""
        source = f"assumed: {each}{watts:g} W (flows.training.power_watts)"
        return Energy(joules_of_all / JOULES_PER_WATT_HOUR, source)
    named = " and ".join(
        name if len(found[name]) == len(values[name]) else _describe_part(name, found[name], values[name])
        for name in values
        if found[name]
    )
    if not named:
        return Energy(None, "not known: no counter can be read, and flows.training.power_watts is null")
    joules_of_all = sum(sum(read) for read in found.values())
    return Energy(joules_of_all / JOULES_PER_WATT_HOUR, f"measured: {named}{'' if is_whole else ' only'}")


def join(first: Energy, second: Energy) -> Energy:
    """Return the energy of two parts of a training; where one is not known that of the other, marked so."""
    if first.watt_hours is None:
        return second if second.watt_hours is None else _mark_part(second)
    if second.watt_hours is None:
        return _mark_part(first)
    sources = dict.fromkeys([*first.source.split(THEN), *second.source.split(THEN)])
    return Energy(first.watt_hours + second.watt_hours, THEN.join(sources))


def _mark_part(energy: Energy) -> Energy:
    return Energy(energy.watt_hours, f"{energy.source.removesuffix(PART)}{PART}")


def _describe_part(name: str, found: Sequence[object], wanted: Sequence[object]) -> str:
    return f"{name} of {len(found)} of {len(wanted)} {COUNTED[name]}"


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
        nvml, handle = find_nvml_device()
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no driver, an old GPU, a GPU in parts: whatever it is, there is no counter
        return None
    return lambda: float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000.0
