"""What a training took: energy, what it emitted, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stages.common.machine.memory import MIB
from stages.finetune.progress.energy import Energy


@dataclass(frozen=True, slots=True)
class Prices:
    """What is assumed of the machine, as `flows.training` has it; None: not known, and not shown.

    Attributes:
        power_watts: where no counter of energy can be read.
        co2_g_per_kwh: grams of CO2 of a kilowatt-hour.
        price_per_hour: in any currency.
    """

    power_watts: float | None = None
    co2_g_per_kwh: float | None = None
    price_per_hour: float | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """What a training took in all its processes, besides the time.

    Attributes:
        limit: operations a second of plain matrix products on the devices that trained.
        share: of that limit, what the training reached.
        estimated_bytes: of memory, before the first step; None: not estimated.
        device_bytes: the most memory that was taken on the GPUs; None: there was none.
    """

    energy: Energy
    prices: Prices
    seconds: float
    limit: float
    share: float
    estimated_bytes: int | None
    device_bytes: int | None

    def to_metrics(self) -> dict[str, Any]:
        """Return what `metrics.json` reports of it."""
        watt_hours, grams, hours = self.energy.watt_hours, self.prices.co2_g_per_kwh, self.seconds / 3600
        price = self.prices.price_per_hour
        return {
            "product_limit_gflops": round(self.limit / 1e9, 1),
            "product_share": float(f"{self.share:.3g}"),  # digits: a tiny model takes far below 1 %
            "estimated_peak_mib": None if self.estimated_bytes is None else self.estimated_bytes // MIB,
            "peak_device_mib": None if self.device_bytes is None else self.device_bytes // MIB,
            "energy_wh": None if watt_hours is None else round(watt_hours, 3),
            "energy_source": self.energy.source,
            "co2_g": None if watt_hours is None or grams is None else round(watt_hours * grams / 1000, 3),
            "cost": None if price is None else round(price * hours, 4),
        }

    def describe(self) -> str:
        """Return it as text; what is not known is left out."""
        found = self.to_metrics()
        parts = [f"{self.share:.0%} of the matrix products of its devices ({self.limit / 1e9:,.0f} GFLOP/s)"]
        if found["energy_wh"] is not None:
            parts.append(f"{found['energy_wh']:.2f} Wh ({self.energy.source})")
        if found["co2_g"] is not None:
            parts.append(f"{found['co2_g']:.2f} g CO2")
        if found["cost"] is not None:
            parts.append(f"cost {found['cost']:.4f}")
        return ", ".join(parts)
