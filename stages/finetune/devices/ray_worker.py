"""What Ray runs on the hosts of its cluster: the processes of a training, and what the first one logs."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.common.artifacts import hash_files
from stages.common.logs import configure_process
from stages.common.machine.devices import inspect_host
from stages.finetune.devices.choice import Place
from stages.finetune.devices.workers import (
    Job,
    check_kinds,
    describe_failure,
    find_interface,
    list_variables,
    open_store,
    quieten,
    run_in_group,
)

if TYPE_CHECKING:
    from torch.distributed import TCPStore

CHUNK_BYTES = 64 << 20

Line = tuple[str, int, str]  # the logger, the level and the message of a log record


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a process is.

    Attributes:
        node: Ray's id of the host.
        address: of the host, in the cluster's network.
        gpus: that Ray gave to the process, by their numbers or ids.
        code: the hash of the stages' code that it runs.
    """

    node: str
    address: str
    gpus: tuple[str, ...]
    code: str


class Worker:
    """A process of a training, as an actor of Ray."""

    _store: TCPStore

    def describe(self) -> Machine:
        """Return where this process is."""
        import ray

        gpus = tuple(str(gpu) for gpu in ray.get_gpu_ids())
        node = ray.get_runtime_context().get_node_id()
        return Machine(node, ray.util.get_node_ip_address(), gpus, hash_code())

    def reads(self, path: str, text: str) -> bool:
        """Return whether a file of the first host is here, too."""
        try:
            return Path(path).read_text(encoding="utf-8") == text
        except OSError:
            return False

    def make_folder(self, name: str) -> str:
        """Return a new folder of this host, in place of one that a killed training left."""
        folder = find_folder(name)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        return str(folder)

    def write(self, path: str, data: bytes) -> None:
        """Append to a file, whose folder is made."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("ab") as file:
            file.write(data)

    def enter(self, folder: str, variables: Mapping[str, str], address: str) -> None:
        """Work in a folder, with these variables; before torch is imported, which reads some of them."""
        os.environ |= variables
        interface = find_interface(address)
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if interface else ():
            os.environ.setdefault(name, str(interface))
        configure_process()
        os.chdir(folder)

    def open_store(self, address: str) -> int:
        """Return the port of a store for all processes, which this one holds."""
        self._store = open_store(address)
        return int(self._store.port)

    def train(
        self, job: Job, place: Place, address: str, port: int, when_memory_is_full: str, log: Any
    ) -> dict[str, Any] | None:
        """Run `job` as one of several processes; return why it failed, or None.

        Args:
            address: of the store, with its port.
            log: the actor that takes the lines of the first process.
        """
        from torch.distributed import TCPStore

        from stages.finetune.devices.group import TIMEOUT

        if place.rank == 0:
            logging.getLogger().handlers = [_Forwarding(log)]
            logging.getLogger().setLevel(logging.INFO)
        quieten(place)
        os.environ |= list_variables(place, address, port)
        try:
            store = TCPStore(address, port, is_master=False, timeout=TIMEOUT)
            kind = inspect_host().kind
            check_kinds(store, kind)
            run_in_group(job, place, kind, store)
        except Exception as error:
            return describe_failure(place, error, when_memory_is_full)
        return None

    def list_files(self, folders: Sequence[str]) -> list[str]:
        """Return the files of folders."""
        return [str(path) for folder in folders for path in sorted(Path(folder).rglob("*")) if path.is_file()]

    def read(self, path: str, offset: int) -> bytes:
        """Return a part of a file; nothing after its end."""
        with Path(path).open("rb") as file:
            file.seek(offset)
            return file.read(CHUNK_BYTES)


class Log:
    """Lines on their way to the process that started the training, as an actor of Ray."""

    def __init__(self) -> None:
        self._lines: list[Line] = []

    def add(self, line: Line) -> None:
        """Take a line."""
        self._lines.append(line)

    def take(self) -> list[Line]:
        """Return the lines since the last call."""
        taken, self._lines = self._lines, []
        return taken


class _Forwarding(logging.Handler):
    """Sends what is logged to the process that started the training."""

    def __init__(self, log: Any) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        if not record.name.startswith("ray"):
            self._log.add.remote((record.name, record.levelno, record.getMessage()))


def hash_code() -> str:
    """Return the hash of the code of all stages as this process would import it."""
    return hash_files(sorted(Path(__file__).resolve().parents[2].rglob("*.py")))


def find_folder(name: str) -> Path:
    """Return the folder of a training on a host that does not share the first one's."""
    return Path(tempfile.gettempdir()) / name


def remove_folder(name: str) -> None:
    """Remove the folder of a training."""
    shutil.rmtree(find_folder(name), ignore_errors=True)
