"""What the processes of one training tell each other; a training in one process has only itself to ask.

Every function that returns the same in all processes waits for all of them, so all must call it.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from stages.common.errors import InputError
from stages.finetune.devices.choice import ALONE, Place

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")

# How long a process waits for the others, where none has ended in a way that closes its connections (a host
# without power). Longer than writing a checkpoint or encoding the rows takes.
TIMEOUT = timedelta(minutes=10)


class _Own:
    """The place of this process."""

    place: Place = ALONE


def join_group(place: Place, kind: str, store: Store) -> None:
    """Connect this process with the others, and give it its GPU.

    Args:
        kind: of the devices: cuda or cpu.
        store: where the processes find each other.
    """
    import torch
    from torch import distributed

    if kind == "cuda":
        torch.cuda.set_device(place.local_rank)
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.processes,
        timeout=TIMEOUT,
    )
    _Own.place = place


def leave_group() -> None:
    """Disconnect this process."""
    from torch import distributed

    _Own.place = ALONE
    distributed.destroy_process_group()


def count_processes() -> int:
    """Return how many processes train together."""
    return _Own.place.processes


def count_local_processes() -> int:
    """Return how many of them train on this host."""
    return _Own.place.local_processes


def is_first_of_host() -> bool:
    """Return whether this process does what one process of each host does."""
    return _Own.place.local_rank == 0


def get_rank() -> int:
    """Return the number of this process, from 0 on."""
    return _Own.place.rank


def is_main() -> bool:
    """Return whether this process writes what the training leaves, and reports it."""
    return _Own.place.rank == 0


def gather(value: T) -> list[T]:
    """Return the value of every process, by rank."""
    if _Own.place.processes == 1:
        return [value]
    from torch import distributed

    values: list[Any] = [None] * _Own.place.processes
    distributed.all_gather_object(values, value)
    return values


def all_agree(answer: bool) -> bool:
    """Return whether the answer of every process is yes."""
    return all(gather(answer))


def wait_for_all() -> None:
    """Wait until every process has come here."""
    gather(None)


def compute_on_hosts(compute: Callable[[], str], what: str, fix: str) -> str:
    """Return what one process of each host computes, if it is the same on all hosts.

    Raises:
        InputError: it is not; the message has every host's.
    """
    own = (platform.node(), compute()) if is_first_of_host() else None
    found = [entry for entry in gather(own) if entry is not None]
    if len({value for _, value in found}) > 1:
        lines = "\n".join(f"  {host}: {value}" for host, value in found)
        raise InputError(f"{what} differ between the hosts of this training:\n{lines}", fix)
    return found[0][1]
