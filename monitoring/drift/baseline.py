"""The reference traffic, summed once: the baseline of every comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from monitoring.drift.bins import Binning, plan_bins
from monitoring.drift.session_sums import SessionSums, sum_sessions
from monitoring.traffic.columns import Column
from monitoring.verdicts import Period
from stages.common.params.loop import DriftSettings

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Baseline:
    """The summed reference that windows are compared with."""

    binning: Binning
    sums: SessionSums

    @property
    def period(self) -> Period:
        """Return the period of the reference and its size."""
        return get_period(self.sums)


def get_period(summed: SessionSums) -> Period:
    """Return the period of some traffic: first and last `received_at`, unix s."""
    return Period(summed.start, summed.end, summed.rows, summed.sessions)


def prepare_baseline(
    tables: Callable[[], Iterable[pa.Table]],
    columns: Sequence[Column],
    settings: DriftSettings,
    max_categories: int,
) -> Baseline:
    """Return the baseline of a reference.

    Args:
        tables: gives the reference's tables; called twice, once to find the bins, once to sum.

    Raises:
        ValueError: the reference is empty.
    """
    binning = plan_bins(tables(), columns, max_categories, settings.blocks, settings.seed)
    return Baseline(binning, sum_sessions(tables(), binning))
