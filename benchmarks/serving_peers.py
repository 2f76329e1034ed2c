"""The contenders of the serving benchmark: the service, its peers' servers, and engines without a server."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

from benchmarks.serving_children import answer_limit, from_row, rows_in_order
from benchmarks.serving_load import Answer, Run, chat_request, get, load
from stages.common.logs import QUIET_ENVIRONMENT
from stages.common.params.loading import load_params
from stages.common.records import Row

START_WITHIN_S = 180.0
END_WITHIN_S = 20.0
POLL_S = 0.2
PARTS = ("artifacts", "reports", "dvc.lock")


@dataclass(frozen=True, slots=True)
class Workspace:
    """A folder in which a service runs with its own events, aliases and model store.

    The pipeline's output is that of the checkout, and so are the parameters.

    Attributes:
        source: the code.
    """

    source: Path
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables for all child processes."""
        own = {"PYTHONPATH": str(self.source), "BENTOML_HOME": str(self.folder / "bentoml")}
        paths = [own["PYTHONPATH"], *filter(None, [os.environ.get("PYTHONPATH")])]
        return {**os.environ, **QUIET_ENVIRONMENT, **own, "PYTHONPATH": os.pathsep.join(paths)}

    @property
    def events_url(self) -> str:
        """URL of the event store, with an absolute path."""
        url = load_params().services.events.url
        prefix = "sqlite:///"
        return f"{prefix}{self.folder / url.removeprefix(prefix)}" if url.startswith(prefix) else url

    def python(self, *arguments: str) -> str:
        """Run a module and return its output.

        Raises:
            subprocess.CalledProcessError: it failed.
        """
        command = [sys.executable, "-m", *arguments]
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=600,
        )
        return done.stdout


@contextmanager
def workspace() -> Iterator[Workspace]:
    """Make a folder next to the checkout's own state, on the same disk, and remove it at the end."""
    source = Path.cwd()
    state = source / ".perennial"
    state.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=state, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        for part in PARTS:
            if (source / part).exists():
                (folder / part).symlink_to((source / part).resolve())
        shutil.copyfile(source / "params.yaml", folder / "params.yaml")
        yield Workspace(source, folder)


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(slots=True)
class Child:
    """A child process with its descendants; its log is a file.

    Attributes:
        started: monotonic, s.
    """

    name: str
    process: subprocess.Popen[str]
    log: Path
    started: float = field(default_factory=time.monotonic)

    def tree(self) -> list[psutil.Process]:
        """Return the process and all its descendants."""
        try:
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def resident_mib(self) -> float:
        """Return the resident memory of the process tree, MiB; pages shared by two processes count twice."""
        total = 0
        for process in self.tree():
            with suppress(psutil.Error):
                total += process.memory_info().rss
        return total / 2**20

    def kill(self) -> int:
        """Kill the whole process tree at once with SIGKILL; return the number of processes."""
        tree = self.tree()
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(tree, END_WITHIN_S)
        self.process.wait(END_WITHIN_S)
        return len(tree)

    def end(self) -> None:
        """Stop it as a user does, then kill the remaining processes with SIGKILL."""
        tree = self.tree()
        if self.process.stdin is not None:
            with suppress(OSError):
                self.process.stdin.close()
        if self.process.poll() is None:
            self.process.terminate()
        _, left = psutil.wait_procs(tree, END_WITHIN_S)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END_WITHIN_S)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def last_words(self) -> str:
        """Return the end of its log."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-3000:]


class NotStarted(RuntimeError):
    """Raised if a contender does not start."""


def start(
    place: Workspace,
    name: str,
    command: Sequence[str],
    *,
    wire: bool = False,
) -> Child:
    """Start a process in a workspace.

    Args:
        wire: its standard output is read by the benchmark, and does not go to the log.
    """
    log = place.folder / f"{name.replace(' ', '-')}.log"
    with open(log, "a", encoding="utf-8") as sink:
        process = subprocess.Popen(
            list(command),
            cwd=place.folder,
            env=place.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if wire else sink,
            stderr=sink,
            text=True,
        )
    return Child(name, process, log)


async def until_ready(child: Child, port: int, path: str) -> float:
    """Wait until a server is ready; return the time since its start, s.

    Raises:
        NotStarted: it ended, or is not ready in time.
    """
    while time.monotonic() - child.started < START_WITHIN_S:
        if (await get(port, path))[0] == 200:
            return time.monotonic() - child.started
        if child.process.poll() is not None:
            raise NotStarted(f"{child.name} ended with {child.process.returncode}:\n{child.last_words()}")
        await asyncio.sleep(POLL_S)
    raise NotStarted(f"{child.name} is not ready after {START_WITHIN_S:g} s:\n{child.last_words()}")


def start_service(place: Workspace, port: int) -> Child:
    """Start the service as `make serve` does, with the checkout's parameters, on another port."""
    address = ("--host", "127.0.0.1", "--port", str(port))
    command = [sys.executable, "-m", "bentoml", "serve", "services.generation:Generation", *address]
    return start(place, "perennial", command)


def child_command(what: str, *arguments: object) -> list[str]:
    """Return the command of a process of `benchmarks.serving_children`."""
    return [sys.executable, "-m", "benchmarks.serving_children", what, *map(str, arguments)]


@dataclass(frozen=True, slots=True)
class Questions:
    """The questions for all contenders: the test rows in one order."""

    rows: list[Row]
    max_tokens: int

    def bodies(self, **more: Any) -> list[dict[str, Any]]:
        """Return the body of a streamed chat request for each row."""
        common = {"max_tokens": self.max_tokens, "temperature": 0, "stream": True, **more}
        return [
            {"messages": [{"role": m.role, "content": m.content} for m in row.prompt], **common}
            for row in self.rows
        ]

    def requests(self, port: int, **more: Any) -> list[bytes]:
        """Return the bytes of a request for each row."""
        return [chat_request(port, body) for body in self.bodies(**more)]


def read_questions() -> Questions:
    """Return the questions of the checkout's test rows."""
    return Questions(rows_in_order(), answer_limit())


class Contender(Protocol):
    """A server or engine to measure."""

    name: str
    child: Child

    async def turn(self, clients: int, first: int, seconds: float, at_least: int) -> Run[Answer]:
        """Answer closed-loop clients for a given time; the rows from `first` on."""
        ...


@dataclass(slots=True)
class Served:
    """A contender with a server."""

    name: str
    child: Child
    port: int
    requests: list[bytes]

    async def turn(self, clients: int, first: int, seconds: float, at_least: int) -> Run[Answer]:
        """See Contender."""
        return await load(self.port, self.requests, clients, from_row(first), seconds, at_least)


@dataclass(slots=True)
class Bare:
    """A contender without a server: it generates its own load, in its own process."""

    name: str
    child: Child

    async def turn(self, clients: int, first: int, seconds: float, at_least: int) -> Run[Answer]:
        """See Contender."""
        wanted = {"clients": clients, "first": first, "seconds": seconds, "at_least": at_least}
        wire = self.child.process
        assert wire.stdin is not None
        assert wire.stdout is not None
        wire.stdin.write(json.dumps(wanted) + "\n")
        wire.stdin.flush()
        line = await asyncio.to_thread(wire.stdout.readline)
        if not line:
            raise NotStarted(f"{self.name} ended in the middle:\n{self.child.last_words()}")
        found = json.loads(line)
        answers = [Answer(**answer) for answer in found["answers"]]
        # What asks and what answers compute in one process: nothing is known of either.
        return Run(**{**found, "answers": answers, "cpu_s": float("nan")})


async def bare(place: Workspace, name: str, what: str, *arguments: object) -> tuple[Bare, dict[str, Any]]:
    """Start a contender without a server; return it with its description of itself.

    Raises:
        NotStarted: it does not start.
    """
    child = start(place, name, child_command(what, *arguments), wire=True)
    assert child.process.stdout is not None
    line = await asyncio.to_thread(child.process.stdout.readline)
    if not line:
        child.end()
        raise NotStarted(f"{name} did not start:\n{child.last_words()}")
    return Bare(name, child), json.loads(line)


async def served(
    place: Workspace, questions: Questions, name: str, path: str, what: str, *arguments: object
) -> Served:
    """Start a peer's server.

    Raises:
        NotStarted: it does not start.
    """
    port = free_port()
    child = start(place, name, child_command(what, "--port", port, *arguments))
    await _ready_or_ended(child, port, path)
    return Served(name, child, port, questions.requests(port))


async def service(place: Workspace, questions: Questions) -> Served:
    """Start the service.

    Raises:
        NotStarted: it does not start.
    """
    port = free_port()
    child = start_service(place, port)
    await _ready_or_ended(child, port, "/readyz")
    return Served("perennial", child, port, questions.requests(port))


async def _ready_or_ended(child: Child, port: int, path: str) -> None:
    try:
        await until_ready(child, port, path)
    except BaseException:
        child.end()
        raise


def installed(module: str) -> bool:
    """Return whether a peer's package is installed."""
    return importlib.util.find_spec(module) is not None


@asynccontextmanager
async def running(place: Workspace, questions: Questions) -> AsyncIterator[Served]:
    """Start a service; end it afterwards. Yields it when it is ready."""
    ours = await service(place, questions)
    try:
        yield ours
    finally:
        await asyncio.to_thread(ours.child.end)


async def about(port: int) -> dict[str, Any]:
    """Return the service's description of its champion; empty while it does not answer."""
    status, body = await get(port, "/v1/models")
    found: dict[str, Any] = json.loads(body)["data"][0]["perennial"] if status == 200 else {}
    return found
