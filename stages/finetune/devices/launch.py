"""Start a training: in this process, in others of this host, as one of torchrun's, or on a Ray cluster."""

from __future__ import annotations

import os

from stages.common.machine.devices import inspect_host
from stages.finetune.devices.choice import (
    Devices,
    check_not_started,
    check_place,
    choose_processes,
    read_place,
)
from stages.finetune.devices.ray_cluster import Files, run_on_ray
from stages.finetune.devices.workers import Job, run_under_torchrun, start_workers


def run_on_devices(
    job: Job, devices: Devices, launcher: str, batch_size: int, when_memory_is_full: str, files: Files
) -> None:
    """Run `job` here, in processes that are started for it, or as one of the processes of torchrun.

    Args:
        job: a function of a module; each process calls it as a member of a group (`devices.group`).
        files: that hosts of a cluster get, and give back.
        when_memory_is_full: what the user can lower.

    Raises:
        InputError: devices, batch and launcher do not fit, or a process failed for a reason that has a fix.
        RuntimeError: a process failed for another reason, with its traceback.
    """
    place = read_place(os.environ)
    if launcher == "torchrun":
        host = inspect_host()
        run_under_torchrun(job, check_place(place, devices, batch_size, host), host.kind)
        return
    check_not_started(place)
    if launcher == "ray":
        run_on_ray(job, devices, batch_size, when_memory_is_full, files)
        return
    host = inspect_host()
    processes = choose_processes(devices, batch_size, host)
    if processes == 1:
        job()
    else:
        start_workers(job, processes, host.kind, when_memory_is_full)
