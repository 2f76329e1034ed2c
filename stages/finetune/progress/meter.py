"""The line of progress of a training: speed, share of the machine's products, memory, time left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stages.common.machine.memory import format_bytes, read_held_memory
from stages.common.machine.products import measure_product_speed
from stages.common.model.virtual_tokens import count_computed_tokens
from stages.finetune.devices.group import count_processes, gather, is_first_of_host, wait_for_all
from stages.finetune.objectives.protocol import Pass
from stages.finetune.progress.cost import Cost, Prices, Taken
from stages.finetune.progress.energy import EnergyMeter
from stages.finetune.progress.flops import StepWork, count_work

PROBE_S = 0.2  # of plain products, before the first step


@dataclass(frozen=True, slots=True)
class Reading:
    """The state of a training: tokens a second, the share of the limit, and the seconds left."""

    tokens_per_second: float
    share: float
    seconds_left: int


class Meter:
    """Measures the steps of this process; seconds in which it does something else are taken off.

    Args:
        dtype: in which the steps compute; trained weights can have another.
        tokens_of_step: tokens of the rows of each update of the whole training.
        first_step: updates that were made by an earlier process.
        earlier: what those took.
    """

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype,
        tokens_of_step: Sequence[int],
        first_step: int,
        prices: Prices | None = None,
        earlier: Taken | None = None,
    ) -> None:
        self._earlier = earlier
        self._device: torch.device = model.device
        self._work = count_work(model)
        self._virtual = count_computed_tokens(model)
        wait_for_all()  # processes that share the cores measure their shares of them
        self._dtype = str(dtype).removeprefix("torch.")
        self._limit = measure_product_speed(self._dtype, self._device.type, PROBE_S)
        self._tokens_of_step, self._first_step = tokens_of_step, first_step
        self._prices = prices or Prices()
        self._energy = EnergyMeter(self._device.type, self._prices.power_watts)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._operations = self.tokens = 0
        self._readers: dict[int, StepWork] = {}
        self._started = time.monotonic()

    def start(self) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def count(self, one: Pass) -> None:
        """Count the operations of a pass, and the tokens that it learns."""
        self.tokens += one.tokens
        if one.reader is None:
            computed = one.sequences * (self._virtual + one.width)
            self._operations += self._work.count(computed, one.answers)
            return
        reader = getattr(one.reader, "module", one.reader)  # inside what averages its gradients
        if id(reader) not in self._readers:
            self._readers[id(reader)] = count_work(reader, learns=False)
        self._operations += self._readers[id(reader)].count(one.sequences * one.width, one.answers)

    def read(self, step: int, paused: float = 0.0) -> Reading:
        """Return the state after an update.

        Args:
            paused: seconds since the start that were not for training.
        """
        self._energy.read()  # the counters of processors begin again: they must be read now and then
        elapsed = time.monotonic() - self._started - paused
        # The plan knows the lengths of all updates, but not those of answers that will be sampled.
        done = sum(self._tokens_of_step[self._first_step : step])
        left = int(elapsed * sum(self._tokens_of_step[step:]) / done)
        speed = self.tokens * count_processes() / elapsed
        return Reading(speed, self._operations / elapsed / self._limit, left)

    def describe(self, reading: Reading) -> str:
        """Return the state as the line of progress has it."""
        left = reading.seconds_left
        if self._device.type == "cuda":
            memory = torch.cuda.memory_reserved(self._device)
        else:
            memory = read_held_memory()
        return (
            f"{reading.tokens_per_second:.0f} tokens/s ({reading.share:.0%} of the products), "
            f"{format_bytes(memory)}, {left // 60}:{left % 60:02d} left"
        )

    def measure_taken(self) -> Taken:
        """Return what the training took until now on all hosts, with its earlier parts; all must call it."""
        hosts = sum(gather(is_first_of_host()))
        since = time.monotonic() - self._started
        return Taken(hosts * since, self._energy.measure()).follow(self._earlier)

    def finish(self, seconds: float, estimated: int | None) -> Cost:
        """Return what the training took in all processes; all must call it.

        Args:
            seconds: of the steps, without what was between them.
            estimated: the bytes that this process was estimated to hold at most.
        """
        taken, is_gpu = self.measure_taken(), self._device.type == "cuda"
        if not is_gpu:  # other programs can have slowed the first measurement, and made the share too large
            wait_for_all()
            again = measure_product_speed(self._dtype, self._device.type, PROBE_S)
            self._limit = max(self._limit, again)
        limit = sum(gather(self._limit))
        return Cost(
            taken,
            self._prices,
            limit,
            sum(gather(self._operations)) / seconds / limit if seconds > 0 else 0.0,
            sum(gather(estimated or 0)) or None,
            sum(gather(torch.cuda.max_memory_reserved(self._device))) if is_gpu else None,
        )
