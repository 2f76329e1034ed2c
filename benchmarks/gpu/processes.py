"""The processes of the parts: each in a session of its own, which ends with everything that it started."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

# What parts import for seconds. A process that is forked after CUDA was asked for anything cannot use it, so
# only tiny parts are forked from one that has imported this.
IMPORTED = (
    "stages.finetune.trainer",
    "stages.finetune.methods.lora",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
    "trl.trainer.sft_trainer",
)


@dataclass(frozen=True, slots=True)
class Running:
    """A process that was begun.

    Attributes:
        wait: waits at most so many seconds; returns the exit code, or None if it still runs.
    """

    pid: int
    wait: Callable[[float], int | None]


def start(module: str, arguments: Sequence[str], log: Path, python: str) -> Running:
    """Run a module with a python; what it prints goes to a file."""
    with log.open("w", encoding="utf-8") as sink:
        process = subprocess.Popen(
            [python, "-m", module, *arguments], stdout=sink, stderr=sink, start_new_session=True
        )

    def wait(seconds: float) -> int | None:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    return Running(process.pid, wait)


def fork(module: str, arguments: Sequence[str], log: Path, python: str = sys.executable) -> Running:
    """Run a module of this python, forked from a process that has imported what takes long."""
    begun, told = _forks().Pipe(duplex=False)
    process = _forks().Process(target=_run, args=(module, list(arguments), str(log), told))
    process.start()
    told.close()
    begun.recv()
    assert process.pid is not None

    def wait(seconds: float) -> int | None:
        process.join(seconds)
        return process.exitcode

    return Running(process.pid, wait)


def end(process: Running) -> None:
    """End a process with everything that it has started, which may outlive it."""
    for how, within_s in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            return
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            process.wait(0.0)
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.1)


@cache
def _forks() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    return context


def _run(module: str, arguments: list[str], log: str, told: Connection) -> None:
    os.setsid()
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(sink, number)
    told.send(None)
    told.close()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
