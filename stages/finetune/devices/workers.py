"""Run a training in several processes of this host, or as one of those that torchrun started.

Processes that are started here live no longer than this one. The first that fails tells why by a store, the
others are ended, and this process raises the reason: there is one error, whatever the number of processes.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

import psutil

from stages.common.errors import InputError
from stages.common.logs import configure_process, explain_failure
from stages.common.machine.parent import end_with_parent
from stages.finetune.devices.choice import Place
from stages.finetune.devices.group import TIMEOUT, join_group, leave_group

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

LOOPBACK = "127.0.0.1"
# After a failure the others have this long to end by themselves, then as long after SIGTERM; then SIGKILL.
PATIENCE_S = 5.0
INTERRUPTED = 130  # the exit code of a shell's command after Ctrl-C

RESUMES = "run again: the training resumes from the last complete checkpoint"
# gloo, NCCL and the store report in their own ways that another process is gone.
_LOST = re.compile(
    r"gloo/transport|NCCL|Connection (was )?(closed|reset|refused)|Broken pipe|failed to recv|TCPStore"
)

Job = Callable[[], None]


def start_workers(job: Job, processes: int, kind: str, when_memory_is_full: str) -> None:
    """Run `job` in several processes of this host, and wait for their end.

    Raises:
        InputError: a process failed for a reason that has a fix, or was killed.
        RuntimeError: a process failed for another reason.
    """
    from torch.multiprocessing.spawn import ProcessException, start_processes

    logging.getLogger("torch.multiprocessing").setLevel(logging.ERROR)  # it reports whom it ends
    store = open_store(LOOPBACK)
    arguments = (job, processes, store.port, kind, when_memory_is_full, os.getpid())
    with _set_variables(_choose_variables(processes)):
        # Daemons end with this process; in its process group, signals for the stage reach them too.
        context = start_processes(_work, arguments, processes, join=False, daemon=True)
    try:
        while not context.join(grace_period=PATIENCE_S):
            pass
    except ProcessException as failure:
        exit_codes = [process.exitcode for process in context.processes]
        raise find_reason(exit_codes, failure.error_index, failure.msg, store) from None
    finally:
        _end(context.processes)


def open_store(address: str) -> TCPStore:
    """Return a store that listens on a free port of an address of this host, and on no other."""
    from torch.distributed import TCPStore

    listening = socket.create_server((address, 0))
    port = listening.getsockname()[1]
    return TCPStore(
        address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
    )


def find_interface(address: str) -> str | None:
    """Return the name of this host's network interface that has an address."""
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, found in interfaces if any(one.address == address for one in found)), None)


def _choose_variables(processes: int) -> dict[str, str]:
    """Return what the processes find in their environment, unless the user has set it."""
    import torch

    threads = max(1, torch.get_num_threads() // processes)
    wanted = {"OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": find_interface(LOOPBACK)}
    return {name: value for name, value in wanted.items() if value and name not in os.environ}


@contextmanager
def _set_variables(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables that are not set, for the processes that are started in the block."""
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


def _work(
    rank: int, job: Job, processes: int, port: int, kind: str, when_memory_is_full: str, parent: int
) -> None:
    """Run `job` as one of the processes that `start_workers` starts."""
    configure_process()
    end_with_parent(parent)
    place = Place(rank, processes, rank, processes)
    quieten(place)
    os.environ |= list_variables(place, LOOPBACK, port)
    from torch.distributed import TCPStore

    store = TCPStore(LOOPBACK, port, is_master=False, timeout=TIMEOUT)
    try:
        run_in_group(job, place, kind, store)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)  # torch.multiprocessing would take it for success
    except Exception as error:
        report_failure(store, place, error, when_memory_is_full)
        sys.exit(1)


def run_under_torchrun(job: Job, place: Place, kind: str) -> None:
    """Run `job` as one of torchrun's processes; only the first that fails shows its error."""
    from torch.distributed import PrefixStore, rendezvous

    end_with_parent(os.getppid())
    quieten(place)
    found, _, _ = next(rendezvous("env://", place.rank, place.processes, timeout=TIMEOUT))
    store = PrefixStore("perennial", found)
    try:
        check_kinds(store, kind)
        run_in_group(job, place, kind, store)
    except Exception as error:
        if not _is_first_failure(store):
            sys.exit(1)
        raise _find_loss(error) or error from None


def check_kinds(store: Store, kind: str) -> None:
    """Refuse to train on GPUs here and on CPUs there.

    Raises:
        InputError: with both kinds.
    """
    first = store.compare_set("kind", "", kind).decode()
    if first != kind:
        raise InputError(
            f"this host ({platform.node()}) would train on {kind}, and another one on {first}",
            "give every host GPUs, or hide them from all with CUDA_VISIBLE_DEVICES=",
        )


def list_variables(place: Place, address: str, port: int) -> dict[str, str]:
    """Return what torchrun sets for a process, where accelerate reads its place.

    Args:
        address: of the store where the processes find each other.
    """
    return {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.processes),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_processes),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def run_in_group(job: Job, place: Place, kind: str, store: Store) -> None:
    """Run `job` as a member of the group that its processes make by a store."""
    from torch.distributed import PrefixStore

    join_group(place, kind, PrefixStore("group", store))
    job()
    leave_group()


def quieten(place: Place) -> None:
    """Let only the first process report: the others would report the same."""
    if place.rank:
        logging.getLogger().setLevel(logging.ERROR)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def report_failure(store: Store, place: Place, error: Exception, when_memory_is_full: str) -> None:
    """Store why this process failed, if no other has failed before."""
    if _is_first_failure(store):
        store.set("failure", json.dumps(describe_failure(place, error, when_memory_is_full)))


def describe_failure(place: Place, error: Exception, when_memory_is_full: str) -> dict[str, Any]:
    """Return why a process failed, as JSON can have it, and whether only because another had ended."""
    lost = _find_loss(error)
    known = lost or explain_failure(error, when_memory_is_full)
    return {
        "rank": place.rank,
        "is_loss": lost is not None,
        "what": known.what if known else "".join(traceback.format_exception(error)),
        "fix": known.fix if known else None,
        "exit_code": known.exit_code if known else 1,
    }


def make_error(found: Mapping[str, Any], processes: int) -> Exception:
    """Return the error of a training one of whose processes failed, from what `describe_failure` found."""
    if found["fix"] is None:
        return RuntimeError(f"process {found['rank']} of {processes} failed:\n{found['what']}")
    failure = InputError(found["what"], found["fix"])
    failure.exit_code = found["exit_code"]
    return failure


def _is_first_failure(store: Store) -> bool:
    return store.add("failures", 1) == 1


def _find_loss(error: Exception) -> InputError | None:
    """Return that the connection to another process was lost, if the error reports this."""
    if not isinstance(error, RuntimeError) or not _LOST.search(str(error)):
        return None
    return InputError(
        f"another process of this training has ended or cannot be reached: {str(error).splitlines()[0]}",
        f"look for the reason in its log; {RESUMES}",
    )


def find_reason(exit_codes: Sequence[int | None], first: int, message: str, store: Store) -> Exception:
    """Return why a training in several processes failed, from what they stored and how they ended.

    Args:
        first: the process that was the first to be seen ended.
        message: what torch knows of its end.
    """
    stored = json.loads(store.get("failure")) if store.check(["failure"]) else None
    if stored is None or stored["is_loss"]:
        # The others may have got SIGTERM from this process: they waited for the one that failed.
        signalled = {rank: -code for rank, code in enumerate(exit_codes) if code is not None and code < 0}
        killed = [rank for rank, number in signalled.items() if rank == first or number != signal.SIGTERM]
        if killed:
            rank = first if first in killed else killed[0]
            name = signal.Signals(signalled[rank]).name
            full = "if the memory was full, lower finetune.batch_size or finetune.devices; "
            return InputError(
                f"process {rank} of {len(exit_codes)} was ended by {name}",
                f"{full if name == 'SIGKILL' else ''}{RESUMES}",
            )
    if stored is None:
        return RuntimeError(f"the processes ended with {exit_codes} and stored no reason: {message}")
    return make_error(stored, len(exit_codes))


def _end(processes: Sequence[BaseProcess]) -> None:
    """End the processes that still run."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + PATIENCE_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
