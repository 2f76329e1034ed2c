"""What a training took: energy, what it emitted, and what it cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.common.artifacts import read_json, write_json
from stages.common.machine.memory import MIB
from stages.finetune.progress.energy import Energy, join

TAKEN = "taken.json"  # in a checkpoint


@dataclass(frozen=True, slots=True)
class Prices:
    """What is assumed of the machine, as `flows.training` has it; None: not known, and not shown.

    Attributes:
        power_watts: of each host, where no counter of energy can be read.
        co2_g_per_kwh: grams of CO2 of a kilowatt-hour.
        price_per_hour: of each host, in any currency.
    """

    power_watts: float | None = None
    co2_g_per_kwh: float | None = None
    price_per_hour: float | None = None


@dataclass(frozen=True, slots=True)
class Taken:
    """What is paid for of a training, or of a part of it.

    Attributes:
        host_seconds: of all hosts together.
    """

    host_seconds: float
    energy: Energy

    def follow(self, earlier: Taken | None) -> Taken:
        """Return this together with what an earlier part of the training took, if there was one."""
        if earlier is None:
            return self
        return Taken(earlier.host_seconds + self.host_seconds, join(earlier.energy, self.energy))


def write_taken(checkpoint: Path, taken: Taken) -> None:
    """Write into a checkpoint what the training took until then, for a process that resumes."""
    write_json(checkpoint / TAKEN, asdict(taken))


def read_taken(checkpoint: Path) -> Taken:
    """Return what the training had taken when a checkpoint was written."""
    found = read_json(checkpoint / TAKEN)
    return Taken(found["host_seconds"], Energy(**found["energy"]))


@dataclass(frozen=True, slots=True)
class Cost:
    """What a training took in all its processes, besides the time.

    Attributes:
        taken: of all parts of a training that was resumed; the others are of the last one.
        limit: operations a second of plain matrix products on the devices that trained.
        share: of that limit, what the training reached.
        estimated_bytes: of memory, before the first step; None: not estimated.
        device_bytes: the most memory that was taken on the GPUs; None: there was none.
    """

    taken: Taken
    prices: Prices
    limit: float
    share: float
    estimated_bytes: int | None
    device_bytes: int | None

    def to_metrics(self) -> dict[str, Any]:
        """Return what `metrics.json` reports of it."""
        watt_hours, hours = self.taken.energy.watt_hours, self.taken.host_seconds / 3600
        grams, price = self.prices.co2_g_per_kwh, self.prices.price_per_hour
        return {
            "product_limit_gflops": round(self.limit / 1e9, 1),
            "product_share": float(f"{self.share:.3g}"),  # digits: a tiny model takes far below 1 %
            "estimated_peak_mib": None if self.estimated_bytes is None else self.estimated_bytes // MIB,
            "peak_device_mib": None if self.device_bytes is None else self.device_bytes // MIB,
            "energy_wh": None if watt_hours is None else round(watt_hours, 3),
            "energy_source": self.taken.energy.source,
            "co2_g": None if watt_hours is None or grams is None else round(watt_hours * grams / 1000, 3),
            "cost": None if price is None else round(price * hours, 4),
        }

    def describe(self) -> str:
        """Return it as text; what is not known is left out."""
        found = self.to_metrics()
        parts = [f"{self.share:.0%} of the matrix products of its devices ({self.limit / 1e9:,.0f} GFLOP/s)"]
        if found["energy_wh"] is not None:
            parts.append(f"{found['energy_wh']:.2f} Wh ({self.taken.energy.source})")
        if found["co2_g"] is not None:
            parts.append(f"{found['co2_g']:.2f} g CO2")
        if found["cost"] is not None:
            parts.append(f"cost {found['cost']:.4f}")
        return ", ".join(parts)
