"""Run a training on the hosts of a Ray cluster: one process a device, each an actor.

This process must be on a node of the cluster; Ray ends the actors when it ends, however that happens.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.common.artifacts import STATE, atomic_dir, make_folder, write_text
from stages.common.errors import InputError
from stages.common.logs import get_logger
from stages.common.machine.devices import Host
from stages.finetune.devices.choice import Devices, Place, choose_processes
from stages.finetune.devices.ray_worker import CHUNK_BYTES, Log, Machine, Worker, hash_code, remove_folder
from stages.finetune.devices.workers import PATIENCE_S, RESUMES, Job, make_error

logger = get_logger("finetune")

ADDRESS = "RAY_ADDRESS"
# How long to wait for devices that other jobs of the cluster use.
WAIT_FOR_DEVICES_S = 600.0
POLL_S = 0.5
# Settings, without credentials, that the processes take from this one's environment.
PASSED_ON = ("HF_HUB_OFFLINE", "NCCL_", "GLOO_", "TORCH_")


@dataclass(frozen=True, slots=True)
class Files:
    """What a host gets that does not see the folder of the stage, and what it gives back.

    Attributes:
        inputs: files and folders, by their paths in the folder of the stage.
        extra_inputs: those that params.yaml names, if they are in the folder; None: it names none.
        outputs: folders that the first process writes.
        checkpoint_url: where the checkpoints are that such hosts write.
    """

    inputs: Sequence[str]
    extra_inputs: Sequence[str | None]
    outputs: Sequence[str]
    checkpoint_url: str | None


@dataclass(frozen=True, slots=True)
class Seat:
    """A process that Ray has started: its actor, where it is, its number, and the folder it works in."""

    actor: Any
    machine: Machine
    place: Place
    folder: str


def run_on_ray(job: Job, devices: Devices, batch_size: int, when_memory_is_full: str, files: Files) -> None:
    """Run `job` in processes of the Ray cluster at `RAY_ADDRESS`, and wait for their end.

    Raises:
        InputError: there is no such cluster, it has too few devices, or a process failed for a reason that
            has a fix.
        RuntimeError: a process failed for another reason.
    """
    with _connect() as ray:
        host = _inspect_cluster(ray)
        processes = choose_processes(devices, batch_size, host)
        folder = f"perennial-{hashlib.sha256(f'{platform.node()} {Path.cwd()}'.encode()).hexdigest()[:16]}"
        with _start_actors(ray, processes, host) as actors:
            machines = _get(ray, [actor.describe.remote() for actor in actors])
            _check_code(machines)
            shares = _find_sharing(ray, actors)
            if not all(shares) and files.checkpoint_url is None:
                without = sorted({m.address for m, sees in zip(machines, shares, strict=True) if not sees})
                raise InputError(
                    f"{', '.join(without)} of the Ray cluster cannot see {Path.cwd()}, and "
                    "finetune.checkpoint_url is null: the checkpoints would be lost with these hosts",
                    "set finetune.checkpoint_url, or put the folder on a file system that all hosts share, "
                    "under the same path",
                )
            try:
                seats = _take_seats(ray, actors, machines, shares, folder)
                _send_inputs(ray, seats, files)
                _train(ray, job, seats, when_memory_is_full)
                _fetch_outputs(ray, seats[0], files.outputs)
            finally:
                for actor in actors:
                    ray.kill(actor)
                _clear(ray, {m.node for m, sees in zip(machines, shares, strict=True) if not sees}, folder)


@contextmanager
def _connect() -> Iterator[Any]:
    """Connect this process with the cluster for the block."""
    address = os.environ.get(ADDRESS)
    if not address or "://" in address:
        raise InputError(
            f"finetune.launcher is ray, and {ADDRESS} is {address or 'not set'}",
            f"start the stage on a node of the cluster with {ADDRESS}=auto; `ray start --head` makes a "
            "cluster of this machine",
        )
    try:
        import ray
    except ImportError:
        raise InputError(
            "finetune.launcher is ray, and Ray is not installed",
            "pip install --constraint requirements.lock --editable '.[ray]', on every node",
        ) from None
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
        raise InputError(
            f"no Ray cluster answers at {ADDRESS}={address}, or this machine is no node of it: "
            f"{str(error).strip().splitlines()[0]}",
            f"start the stage on a node of the cluster with {ADDRESS}=auto and the cluster's RAY_AUTH_MODE "
            "and RAY_AUTH_TOKEN; the cluster needs the versions of requirements.lock",
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _inspect_cluster(ray: Any) -> Host:
    nodes = _list_resources(ray)
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if gpus:
        return Host("cuda", gpus, "the Ray cluster")
    return Host("cpu", sum(int(node.get("CPU", 0)) for node in nodes), "the Ray cluster")


def _list_resources(ray: Any) -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def choose_cores(cores: Sequence[int], processes: int) -> int:
    """Return the most cores that each process can have, so that all find room on the nodes.

    Args:
        cores: of each node.
    """
    most = sum(cores) // processes
    return next(n for n in range(most, 0, -1) if sum(own // n for own in cores) >= processes)


@contextmanager
def _start_actors(ray: Any, processes: int, host: Host) -> Iterator[list[Any]]:
    """Start an actor for each process, each with its device, close together; end them after the block."""
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    on_gpus = host.kind == "cuda"
    cores = [int(node.get("CPU", 0)) for node in _list_resources(ray)]
    each = {"GPU": 1} if on_gpus else {"CPU": choose_cores(cores, processes)}
    group = placement_group([each] * processes, strategy="PACK")
    try:
        if not group.wait(5):
            logger.warning("waiting for %d devices of the Ray cluster, which other jobs use", processes)
            if not group.wait(WAIT_FOR_DEVICES_S):
                raise InputError(
                    f"{processes} devices of the Ray cluster were not free for {WAIT_FOR_DEVICES_S:.0f} s",
                    "run again when other jobs have ended, or lower finetune.devices",
                )
        actor = ray.remote(max_restarts=0, num_cpus=each.get("CPU", 0), num_gpus=each.get("GPU", 0))(Worker)
        yield [
            actor.options(
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=number
                )
            ).remote()
            for number in range(processes)
        ]
    finally:
        remove_placement_group(group)


def _get(ray: Any, references: Any) -> Any:
    """Return what actors return.

    Raises:
        InputError: one of them has ended, or could not be started.
    """
    try:
        return ray.get(references)
    except ray.exceptions.RayError as error:
        raise _explain_end(error, "a process of the Ray cluster") from None


def _explain_end(error: Exception, who: str) -> InputError:
    cause = getattr(error, "cause", None)  # of what an actor raised
    reason = f"{type(cause).__name__}: {cause}" if cause else str(error).strip().splitlines()[0]
    return InputError(
        f"{who} has ended, could not start, or its host was lost: {reason}",
        "look at the host and its logs of Ray: its memory may have been full (lower finetune.batch_size), or "
        f"it may lack the code or the versions of requirements.lock; {RESUMES}",
    )


def _check_code(machines: Sequence[Machine]) -> None:
    others = sorted({machine.address for machine in machines if machine.code != hash_code()})
    if others:
        raise InputError(
            f"{', '.join(others)} of the Ray cluster would run other code of the stages than this checkout's",
            "build the image of the hosts from this checkout, or share its folder and set PYTHONPATH to it",
        )


def _find_sharing(ray: Any, actors: Sequence[Any]) -> list[bool]:
    """Return which processes see the folder of the stage under its path."""
    marker = Path.cwd() / STATE / f"ray-{uuid.uuid4().hex}"
    make_folder(marker.parent)
    write_text(marker, marker.name)
    try:
        found: list[bool] = _get(ray, [actor.reads.remote(str(marker), marker.name) for actor in actors])
        return found
    finally:
        marker.unlink()


def _take_seats(
    ray: Any, actors: Sequence[Any], machines: Sequence[Machine], shares: Sequence[bool], folder: str
) -> list[Seat]:
    """Number the processes host by host, those that share the folder first, and let them enter it."""
    order = sorted(range(len(actors)), key=lambda n: (not shares[n], machines[n].node, n))
    nodes = [machines[n].node for n in order]
    seats: list[Seat] = []
    for rank, n in enumerate(order):
        node = nodes[rank]
        place = Place(rank, len(order), rank - nodes.index(node), nodes.count(node))
        if shares[n]:
            entered = str(Path.cwd())
        elif place.local_rank == 0:
            entered = _get(ray, actors[n].make_folder.remote(f"{folder}-{node[:12]}"))
        else:
            entered = seats[nodes.index(node)].folder
        seats.append(Seat(actors[n], machines[n], place, entered))
    resources = {node["NodeID"]: node["Resources"] for node in ray.nodes()}
    passed_on = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    for seat in seats:
        of_host = [other for other in seats if other.machine.node == seat.machine.node]
        cores = int(resources[seat.machine.node].get("CPU", 1))
        variables = {**passed_on, "OMP_NUM_THREADS": str(max(1, cores // len(of_host)))}
        if seat.machine.gpus:
            # As under torchrun: each process sees all GPUs of its host that the training has.
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpu for one in of_host for gpu in one.machine.gpus)
        _get(ray, seat.actor.enter.remote(seat.folder, variables, seat.machine.address))
    return seats


def _send_inputs(ray: Any, seats: Sequence[Seat], files: Files) -> None:
    """Copy the inputs to each host that does not share the folder, in parts that the memory can hold."""
    receivers = [seat for seat in seats if seat.place.local_rank == 0 and seat.folder != str(Path.cwd())]
    if not receivers:
        return
    named = [name for name in files.extra_inputs if name and not Path(name).is_absolute()]
    found = [Path(name) for name in dict.fromkeys([*files.inputs, *named]) if Path(name).exists()]
    paths = [path for top in found for path in ([top] if top.is_file() else sorted(top.rglob("*")))]
    paths = [path for path in paths if path.is_file()]
    size = sum(path.stat().st_size for path in paths)
    logger.info("sending %d files (%d MiB) to %d hosts", len(paths), size >> 20, len(receivers))
    for path in paths:
        with path.open("rb") as file:
            while (part := file.read(CHUNK_BYTES)) or not file.tell():
                data = ray.put(part)
                _get(ray, [seat.actor.write.remote(f"{seat.folder}/{path}", data) for seat in receivers])
                if not part:
                    break


def _train(ray: Any, job: Job, seats: Sequence[Seat], when_memory_is_full: str) -> None:
    """Let all processes train, show what the first one logs, and raise why the first that failed did."""
    first, address = seats[0].actor, seats[0].machine.address
    port = _get(ray, first.open_store.remote(address))
    log = ray.remote(num_cpus=0)(Log).remote()
    running = {
        seat.actor.train.remote(job, seat.place, address, port, when_memory_is_full, log): seat.place
        for seat in seats
    }
    reasons: list[tuple[int, Exception]] = []  # with how likely another one caused it
    deadline = float("inf")
    while running and time.monotonic() < deadline:
        ended, _ = ray.wait(list(running), num_returns=1, timeout=POLL_S)
        _show(ray, log)
        for reference in ended:
            place = running.pop(reference)
            try:
                found = ray.get(reference)
            except ray.exceptions.RayError as error:
                who = f"process {place.rank} of {place.processes}"
                reasons.append((1, _explain_end(error, who)))
            else:
                if found:
                    reasons.append((2 * found["is_loss"], make_error(found, place.processes)))
        if reasons and deadline == float("inf"):
            # The others lose their connections; one that is still running may have the reason.
            deadline = time.monotonic() + PATIENCE_S
        if any(doubt == 0 for doubt, _ in reasons):
            break
    _show(ray, log)
    if reasons:
        raise min(reasons, key=lambda reason: reason[0])[1]


def _show(ray: Any, log: Any) -> None:
    with suppress(ray.exceptions.RayError):  # its host may be lost; the training's end has the reason
        for name, level, message in ray.get(log.take.remote(), timeout=POLL_S):
            logging.getLogger(name).log(level, "%s", message)


def _fetch_outputs(ray: Any, seat: Seat, outputs: Sequence[str]) -> None:
    """Bring what the first process wrote into this folder, if it works in another."""
    if seat.folder == str(Path.cwd()):
        return
    for output in outputs:
        top = Path(seat.folder) / output
        with atomic_dir(Path(output)) as temporary:
            for name in _get(ray, seat.actor.list_files.remote([str(top)])):
                target = temporary / Path(name).relative_to(top)
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as file:
                    while part := _get(ray, seat.actor.read.remote(name, file.tell())):
                        file.write(part)


def _clear(ray: Any, nodes: set[str], folder: str) -> None:
    """Remove the folders that hosts had for this training; a host that is gone is left alone."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(remove_folder)
    removing = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            f"{folder}-{node[:12]}"
        )
        for node in nodes
    ]
    if removing:
        with suppress(ray.exceptions.RayError):
            ray.wait(removing, num_returns=len(removing), timeout=PATIENCE_S)
