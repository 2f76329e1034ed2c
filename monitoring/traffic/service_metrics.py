"""How fast and at what cost a window was answered, summed as its feature tables pass by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import pyarrow as pa

Floats = npt.NDArray[np.float64]

TIME_BINS_PER_DECADE = 200  # of the service's times: quantiles are off by 0.6 % at most
TIME_DECADES = (-4, 5)  # from 0.1 ms to a day


@dataclass(slots=True)
class ServiceSums:
    """How fast and at what cost a window was answered; feature tables are added in the order of time.

    The busy time is that in which at least one answer was being written: answers side by side share it.
    """

    requests: int = 0
    refused: int = 0
    failed: int = 0
    cancelled: int = 0
    tokens: float = 0.0
    busy_s: float = 0.0
    _busy_until: float = -math.inf
    _times: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)

    def add(self, table: pa.Table) -> None:
        """Add the rows of a feature table that has the service's columns."""
        self.requests += table.num_rows
        self.refused += _sum(table, "refused")
        self.failed += _sum(table, "failed")
        self.cancelled += _sum(table, "cancelled")
        self.tokens += float(np.nansum(_numbers(table, "tokens")))
        for name in ("queue_s", "first_token_s", "total_s"):
            values = _numbers(table, name)
            counted = np.bincount(_time_bins(values[~np.isnan(values)]), minlength=_TIME_BINS)
            self._times[name] = self._times.get(name, np.zeros(_TIME_BINS, dtype=np.int64)) + counted
        self._add_busy(_numbers(table, "received_at"), _numbers(table, "total_s"))

    def _add_busy(self, starts: Floats, lengths: Floats) -> None:
        timed = ~np.isnan(lengths)
        starts = starts[timed]
        if not len(starts):
            return
        ends = starts + lengths[timed]
        until = np.maximum.accumulate(np.concatenate(([self._busy_until], ends)))
        self.busy_s += float(np.maximum(0.0, ends - np.maximum(starts, until[:-1])).sum())
        self._busy_until = float(until[-1])

    def metrics(self, cost_per_hour: float) -> dict[str, float | None]:
        """Return the figures: times in s (p50, p95), tokens a busy second, cost of 1,000 requests."""
        metrics: dict[str, float | None] = {
            "requests": self.requests,
            "refused": self.refused,
            "failed": self.failed,
            "cancelled": self.cancelled,
            "busy_s": round(self.busy_s, 3),
            "tokens_per_s": round(self.tokens / self.busy_s, 2) if self.busy_s else None,
            "cost_per_1000": compute_cost_per_1000(self.busy_s, self.requests, cost_per_hour),
        }
        for name, counts in self._times.items():
            for share in (0.5, 0.95):
                metrics[f"{name.removesuffix('_s')}_p{share * 100:.0f}_s"] = _time_quantile(counts, share)
        return metrics


def tap_service_sums(tables: Iterable[pa.Table], sums: ServiceSums) -> Iterator[pa.Table]:
    """Yield the tables as they come, each added to `sums`: one reading serves the verdict and the figures."""
    for table in tables:
        sums.add(table)
        yield table


def compute_cost_per_1000(compute_s: float, requests: int, cost_per_hour: float) -> float | None:
    """Return what 1,000 requests cost on a machine that costs `cost_per_hour`; None without requests."""
    return round(compute_s / 3600.0 * cost_per_hour / requests * 1000.0, 6) if requests else None


def _numbers(table: pa.Table, name: str) -> Floats:
    return np.asarray(table[name].to_numpy(), dtype=np.float64)


def _sum(table: pa.Table, name: str) -> int:
    return int(np.nansum(_numbers(table, name)))


_TIME_BINS = (TIME_DECADES[1] - TIME_DECADES[0]) * TIME_BINS_PER_DECADE


def _time_bins(values: Floats) -> npt.NDArray[np.int64]:
    logs = np.log10(np.maximum(values, 10.0 ** TIME_DECADES[0])) - TIME_DECADES[0]
    bins: npt.NDArray[np.int64] = np.minimum(logs * TIME_BINS_PER_DECADE, _TIME_BINS - 1).astype(np.int64)
    return bins


def _time_quantile(counts: npt.NDArray[np.int64], share: float) -> float | None:
    total = int(counts.sum())
    if not total:
        return None
    number = int(np.searchsorted(np.cumsum(counts), max(1.0, math.ceil(share * total))))
    # Less than the first bin's width is as good as nothing.
    return float(f"{10 ** ((number + 0.5) / TIME_BINS_PER_DECADE + TIME_DECADES[0]):.3g}") if number else 0.0
