"""Run DVC stages as processes: each in a session of its own, its output read line by line."""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal

from flows.training import dvc_locks
from stages.common.errors import TransientError

TAIL_LINES = 60  # kept for the error of a failed stage
BLOCKED_POLL_S = 1.0
INTERRUPT_PATIENCE_S = 8.0  # then SIGKILL
READ_POLL_S = 0.5
# The kernel's killer of processes when the memory is full; the process itself prints nothing.
KILLED = (
    "if it was not stopped by hand, the machine ran out of memory: lower finetune.batch_size or "
    "finetune.max_length, or end other programs"
)
CHUNK_BYTES = 65536

_PROGRESS = re.compile(r"^(?:[\w.]+: )?progress (\d+)/(\d+) ?(.*)$")
_BAR = re.compile(r"\d+%\|")
_EXITED = re.compile(r"exited with (-?\d+)$")
_BLOCKER = re.compile(r"^  \(PID (\d+)\): (.*)$")
# What DVC prints on every run; Prefect shows the same by its states.
_DVC_CHATTER = re.compile(
    r"^(Running stage '|> |Stage '.*' didn't change|Stage '.*' is cached|Generating lock file"
    r"|Updating lock file|To track the changes with git|\tgit add |To enable auto staging|\tdvc config "
    r"|Use `dvc push`"
    r"|Data and pipelines are up to date|Reproducing stage "
    # A list of what a stage excluded is empty when all is well.
    r"|WARNING: '.*' is empty\.$)"
)
_DVC_ERROR = re.compile(r"^ERROR: failed to reproduce ")


@dataclass(frozen=True)
class Progress:
    """`done` of `total` steps, with the stage's note."""

    done: int
    total: int
    note: str


@dataclass(frozen=True)
class StageResult:
    """The result of a stage."""

    how: Literal["ran", "unchanged", "restored", "failed", "blocked"]
    message: str = ""  # of a failure: the stage's own error
    exit_code: int = 0  # of the stage's command, negative for a signal
    blockers: tuple[dvc_locks.Holder, ...] = ()

    @property
    def is_temporary(self) -> bool:
        """Whether a retry may help, by the exit code of the stage."""
        return self.how == "failed" and self.exit_code == TransientError.exit_code


def parse_progress(line: str) -> Progress | None:
    """Return the progress in a line of a stage; None for any other line."""
    match = _PROGRESS.match(line)
    return Progress(int(match[1]), int(match[2]), match[3].strip()) if match else None


def is_chatter(line: str) -> bool:
    """Return whether a line is routine output of DVC, a progress bar, or empty."""
    failed = _DVC_ERROR.match(line) and _EXITED.search(line)  # the stage has printed its error
    return not line.strip() or bool(_DVC_CHATTER.match(line) or _BAR.search(line) or failed)


def find_error(lines: list[str], stage: str, exit_code: int) -> str:
    """Return the error that the stage printed, from its last lines."""
    output = [line for line in lines if not is_chatter(line)]
    for position, line in enumerate(output):
        if line.startswith("error: "):
            return "\n".join([line.removeprefix("error: "), *output[position + 1 :]])
        if line.startswith("ERROR: "):  # DVC's own: the stage never started
            return line.removeprefix("ERROR: ").removeprefix(f"failed to reproduce '{stage}': ")
    last = next((line for line in reversed(output) if line.strip()), "")
    how = f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with exit code {exit_code}"
    what = f"it {how}; its last line: {last}" if last else f"it {how} and printed nothing"
    return f"{what}\n  fix: {KILLED}" if exit_code == -signal.SIGKILL else what


@dataclass
class StageProcess:
    """`dvc repro --single-item STAGE`, running."""

    stage: str
    process: subprocess.Popen[bytes]
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))

    def lines(self) -> Iterator[str]:
        """Yield what DVC and the stage write, line by line, until they end.

        The pipe closes when the last process of the group ends. If DVC was killed, the stage it ran
        lives on with the pipe open; it is killed too, as its outputs would not be recorded.
        """
        rest = b""
        for chunk in self._chunks():
            *whole, rest = (rest + chunk).replace(b"\r", b"\n").split(b"\n")
            for line in whole:
                yield self._text(line)
        if rest:
            yield self._text(rest)

    def _chunks(self) -> Iterator[bytes]:
        assert self.process.stdout is not None
        with self.process.stdout as pipe, selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while True:
                if selector.select(READ_POLL_S):
                    chunk = os.read(pipe.fileno(), CHUNK_BYTES)
                    if not chunk:
                        return
                    yield chunk
                elif self.process.poll() is not None:
                    # DVC is gone and the pipe silent, but something still holds it.
                    if self.process.returncode < 0:
                        self.signal(signal.SIGKILL)
                    return

    def _text(self, line: bytes) -> str:
        text = line.decode("utf-8", errors="replace")
        self.tail.append(text)
        return text

    def result(self) -> StageResult:
        """Return its result; call after the last line."""
        code = self.process.wait()
        tail = list(self.tail)
        if code == 0:
            if any(line.startswith(f"Stage '{self.stage}' didn't change") for line in tail):
                return StageResult("unchanged")
            if any(line.startswith(f"Stage '{self.stage}' is cached") for line in tail):
                return StageResult("restored")
            return StageResult("ran")
        blockers = tuple(
            dvc_locks.Holder(int(match[1]), match[2]) for match in map(_BLOCKER.match, tail) if match
        )
        if blockers and any("is busy, it is being blocked by" in line for line in tail):
            return StageResult("blocked", "", code, blockers)
        exited = next((match for match in map(_EXITED.search, reversed(tail)) if match), None)
        stage_code = int(exited[1]) if exited else code
        return StageResult("failed", find_error(tail, self.stage, stage_code), stage_code)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to DVC, the stage and all they started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class StageProcesses:
    """The stage processes of a run."""

    def __init__(self, root: Path, *, force: bool = False) -> None:
        self._root = root
        self._force = force
        self._guard = threading.Lock()
        self._running: dict[str, StageProcess] = {}
        self._waiting: dict[str, StageProcess] = {}
        self.stopped_by: signal.Signals | None = None

    def start_early(self, stage: str) -> None:
        """Start a stage that `take` will ask for; meanwhile its lines wait in the pipe."""
        process = self._start(stage)
        with self._guard:
            self._waiting[stage] = process

    def take(self, stage: str) -> StageProcess:
        """Return the process of a stage, started early or now."""
        with self._guard:
            early = self._waiting.pop(stage, None)
        return early or self._start(stage)

    def _start(self, stage: str) -> StageProcess:
        with self._guard:
            if self.stopped_by is not None:
                raise InterruptedError(f"not started: the run was stopped by {self.stopped_by.name}")
            force = ["--force"] if self._force else []
            process = subprocess.Popen(
                [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", *force, stage],
                cwd=self._root,
                env=stage_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            started = StageProcess(stage, process)
            self._running[stage] = started
        # A signal between the question above and this line did not see the new process.
        if self.stopped_by is not None:
            started.signal(signal.SIGINT)
        return started

    def run(
        self, stage: str, on_line: Callable[[str], None], on_blocked: Callable[[StageResult], bool]
    ) -> StageResult:
        """Run a stage to its end.

        Args:
            stage: its name in dvc.yaml.
            on_line: gets every line while it comes.
            on_blocked: gets the result when another DVC process writes the same files; true waits
                for that process and tries again, false gives up.
        """
        while True:
            process = self.take(stage)
            for line in process.lines():
                on_line(line)
            result = process.result()
            with self._guard:
                self._running.pop(stage, None)
            if result.how != "blocked" or not on_blocked(result):
                return result
            while self.stopped_by is None and any(dvc_locks.is_alive(holder) for holder in result.blockers):
                time.sleep(BLOCKED_POLL_S)
            dvc_locks.clear_dead(self._root)

    def stop(self, number: signal.Signals) -> None:
        """Interrupt what runs and start nothing more; at the second call, or after a while, kill it."""
        again, self.stopped_by = self.stopped_by is not None, number
        if again:
            self.kill()
        else:
            self.interrupt()

    def interrupt(self) -> None:
        """Interrupt what runs, and kill what of it still runs after a while; other stages may start."""
        # No lock is taken here: this runs in a signal handler, which may have interrupted its holder.
        running = list(self._running.values())
        for process in running:
            process.signal(signal.SIGINT)

        def kill_rest() -> None:
            for process in running:
                if process.process.poll() is None:
                    process.signal(signal.SIGKILL)

        timer = threading.Timer(INTERRUPT_PATIENCE_S, kill_rest)
        timer.daemon = True
        timer.start()

    def kill(self) -> None:
        """Kill what still runs."""
        for process in list(self._running.values()):
            process.signal(signal.SIGKILL)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """End whatever still runs when the block is left."""
        try:
            yield
        finally:
            if self._running:
                self.stop(signal.SIGTERM)
                deadline = time.monotonic() + INTERRUPT_PATIENCE_S
                while time.monotonic() < deadline and self._any_alive():
                    time.sleep(0.1)
                self.kill()

    def _any_alive(self) -> bool:
        return any(process.process.poll() is None for process in list(self._running.values()))

    @contextmanager
    def stopping_on(self, *numbers: signal.Signals) -> Iterator[None]:
        """Let these signals stop the stages inside the block; the caller then ends in good order."""

        def handle(number: int, _frame: FrameType | None) -> None:
            self.stop(signal.Signals(number))

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def stage_environment() -> dict[str, str]:
    """Return the environment of a stage: `python` is this one, and its lines come at once."""
    own = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": os.pathsep.join([own, os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
        "DVC_NO_ANALYTICS": "1",
    }
