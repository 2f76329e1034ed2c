"""How many processes train: from params.yaml, what the host has, and what torchrun started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from stages.common.errors import InputError
from stages.common.logs import get_logger
from stages.common.machine.devices import Host, check_batch_size, check_devices

logger = get_logger("finetune")

# What torchrun sets for each process that it starts.
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

Devices = int | Literal["auto"]


@dataclass(frozen=True, slots=True)
class Place:
    """The number of a process, from 0 on, among all processes of a training and among those of its host."""

    rank: int
    processes: int
    local_rank: int
    local_processes: int


ALONE = Place(0, 1, 0, 1)


def choose_processes(devices: Devices, batch_size: int, host: Host) -> int:
    """Return how many processes to start on this host: one for each GPU, or as many as asked for.

    Raises:
        InputError: the host has fewer devices, or a batch fewer rows.
    """
    if devices == "auto":
        available = host.count if host.kind == "cuda" else 1
        if available > batch_size:
            logger.warning(
                "%d of %d GPUs are used: finetune.batch_size is %d, and each takes a row of a batch at least",
                batch_size,
                available,
                batch_size,
            )
        return min(available, batch_size)
    check_devices(devices, host, f"finetune.devices is {devices}")
    check_batch_size(batch_size, devices)
    _warn_if_uneven(batch_size, devices)
    return devices


def _warn_if_uneven(batch_size: int, processes: int) -> None:
    if batch_size % processes:
        logger.warning(
            "finetune.batch_size %d is no multiple of %d processes: some wait for those with a row more",
            batch_size,
            processes,
        )


def read_place(environment: Mapping[str, str]) -> Place | None:
    """Return this process's place, from what torchrun has set; None if torchrun did not start it.

    Raises:
        InputError: only a part of it is set, or not to numbers.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    unset = [name for name in _VARIABLES if name not in environment]
    numbers = {name: environment[name] for name in _VARIABLES[:4] if name in environment}
    wrong = [f"{name}={value}" for name, value in numbers.items() if not value.isdecimal()]
    if unset or wrong:
        reason = f"{', '.join(unset)} not" if unset else f"not to whole numbers: {', '.join(wrong)}"
        raise InputError(
            f"RANK and WORLD_SIZE are set as by torchrun, but {reason}",
            "start the stage with torchrun, which sets what is needed, or unset RANK and WORLD_SIZE",
        )
    return Place(*map(int, numbers.values()))


def check_place(place: Place | None, devices: Devices, batch_size: int, host: Host) -> Place:
    """Return the place that torchrun gave this process, if it fits params.yaml and the host.

    Raises:
        InputError: it was not started by torchrun, or with more processes than there are devices or rows, or
            with another number than `finetune.devices`.
    """
    if place is None:
        raise InputError(
            "finetune.launcher is torchrun, but torchrun did not start this process",
            "torchrun --standalone --nproc-per-node 2 -m stages.finetune, or set finetune.launcher: local",
        )
    started = f"torchrun started {place.local_processes} processes on this host"
    if devices not in ("auto", place.local_processes):
        raise InputError(
            f"{started}, and finetune.devices is {devices}",
            f"torchrun --nproc-per-node {devices}, or set finetune.devices: auto",
        )
    if host.kind not in ("cuda", "cpu") and place.processes > 1:
        raise InputError(
            f"torchrun started {place.processes} processes, and torch cannot connect several on {host.kind}",
            "train in one process: finetune.launcher: local and finetune.devices: auto",
        )
    check_devices(place.local_processes, host, started)
    check_batch_size(batch_size, place.processes)
    _warn_if_uneven(batch_size, place.processes)
    return place


def check_not_started(place: Place | None) -> None:
    """Refuse to start processes from one of several that something else has started.

    Raises:
        InputError: with the number of processes.
    """
    if place is not None:
        raise InputError(
            f"this is process {place.rank} of {place.processes} of torchrun (RANK and WORLD_SIZE are set), "
            "and another finetune.launcher would start others from each of them",
            "set finetune.launcher: torchrun, or start the stage without torchrun",
        )
