"""Try the schemas of requests in processes of their own, within a budget of CPU seconds and memory.

Compiling a schema, and checking an answer against it, can take a time that doubles with each of its lines.
Neither can be interrupted in a thread. So both happen in a process that the kernel ends once it has used its
budget, and what it was doing is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from services.engines.calls.bounds import check_bounds
from services.engines.protocol import QueueFull, SchemaUnsupported
from services.guard.checks import GuardDecision
from stages.common.machine.parent import make_parent_variable
from stages.common.messages import Message, Tool

MAX_WAITING = 64  # jobs that wait for a process; more are refused
MAX_VERDICTS = 1024  # schemas whose verdict is remembered
MAX_VOCABULARIES = 4  # a few MB each
LEARN_CPU_S = 60.0  # for a vocabulary, which is the model's own and no request's
# A budget is in CPU seconds, so that a verdict does not depend on what else runs; this is its bound in time.
MAX_WALL_S = 60.0

logger = logging.getLogger("services.schemas")


class SchemaTrials:
    """Tries schemas before they reach an engine, and answers against them.

    Args:
        cpu_s: budget of one trial in CPU seconds.
    """

    def __init__(self, cpu_s: float) -> None:
        self._cpu_s = cpu_s
        # Answers wait for no compilation, and feedback for no answer: each kind of job has a process, which
        # starts with the first.
        self._compiling = _Lane()
        self._checking = _Lane()
        self._correcting = _Lane()
        self._verdicts: OrderedDict[tuple[str, str], str | None] = OrderedDict()

    async def check_schema(self, schema: str, name: str, tokenizer: Any) -> None:
        """Check that a schema is valid, and compiles within the budget.

        Args:
            name: of the model, whose `tokenizer` the schema is compiled for.

        Raises:
            SchemaUnsupported: it is not; the message has the reason.
            QueueFull: too many schemas wait to be tried, or the machine is too busy for this one.
        """
        check_bounds(schema)
        await self._try({"do": "compile", "schema": schema}, schema, name, tokenizer)

    async def check_grammar(
        self, grammar: str, schemas: Sequence[str], probes: Sequence[str], name: str, tokenizer: Any
    ) -> None:
        """Check that schemas are valid, and a grammar that holds them compiles within the budget.

        Args:
            grammar: in llguidance's form of Lark.
            probes: beginnings of answers, behind which a grammar has most to do.
            name: of the model, whose `tokenizer` the grammar is compiled for.

        Raises:
            SchemaUnsupported: it is not; the message has the reason.
            QueueFull: as `check_schema`.
        """
        job = {"do": "compile_grammar", "grammar": grammar, "schemas": schemas, "probes": probes}
        await self._try(job, grammar, name, tokenizer)

    async def _try(self, job: dict[str, Any], tried: str, name: str, tokenizer: Any) -> None:
        key = (name, tried)
        if key in self._verdicts:
            self._verdicts.move_to_end(key)
            problem = self._verdicts[key]
        else:
            job = {**job, "name": name, "cpu_s": self._cpu_s}
            problem = (await self._compiling.run(job, tokenizer)).get("problem")
            self._verdicts[key] = problem
            if len(self._verdicts) > MAX_VERDICTS:
                self._verdicts.popitem(last=False)
        if problem is not None:
            raise SchemaUnsupported(problem)

    async def check_answer(self, answer: str, schema: str) -> GuardDecision:
        """Return whether an answer fits a schema; one that cannot be checked within the budget does not."""
        job = {"do": "check", "schema": schema, "answer": answer, "cpu_s": self._cpu_s}
        try:
            result = await self._checking.run(job, None)
        except QueueFull:
            result = {"problem": "busy"}
        if "problem" in result:
            return GuardDecision(False, "schema_too_slow")
        return GuardDecision(result["allow"], result["reason"])

    async def find_wrong_turn(
        self, turn: Message, tools: Mapping[str, Tool], changes: Sequence[str]
    ) -> str | None:
        """Return what is wrong with a correction that a model may learn, and what to do; None if nothing is.

        Args:
            turn: the correction; tools: of the request, by their names.
            changes: that `curate` makes in arguments.

        Raises:
            SchemaUnsupported: the turn cannot be checked within the budget.
            QueueFull: too many corrections wait to be checked.
        """
        job = {
            "do": "check_turn",
            "content": turn.content,
            "calls": [(call.name, call.arguments) for call in turn.tool_calls],
            "tools": [tool.text for tool in tools.values()],
            "changes": changes,
            "cpu_s": self._cpu_s,
        }
        result = await self._correcting.run(job, None)
        if "problem" in result:
            raise SchemaUnsupported(result["problem"])
        return result["wrong"]  # type: ignore[no-any-return]

    def count_waiting(self) -> int:
        """Return how many requests wait for the trial of a schema, the running one included."""
        return self._compiling.waiting

    def close(self) -> None:
        """End the processes."""
        self._compiling.close()
        self._checking.close()
        self._correcting.close()


class _Lane:
    """One process, and the thread that waits for it."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="schema")
        self._process: _Process | None = None
        self._known: set[str] = set()  # vocabularies that the process has
        self._learning: OrderedDict[str, bytes] = OrderedDict()  # jobs that teach them, by name
        self.waiting = 0
        self._closed = False

    async def run(self, job: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
        """Return the result of a job; a caller that is cancelled while it waits leaves the queue."""
        if self.waiting >= MAX_WAITING:
            raise QueueFull(f"{self.waiting} schemas wait to be checked")
        if self._closed:
            raise QueueFull("the service is stopping")
        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, self._do, job, tokenizer)
        finally:
            self.waiting -= 1

    def close(self) -> None:
        self._closed = True
        if self._process is not None:
            self._process.kill()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _do(self, job: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
        if self._process is None or self._process.has_ended():
            if self._closed:
                raise QueueFull("the service is stopping")
            self._process, self._known = _Process(), set()
        if tokenizer is not None and job["name"] not in self._known:
            learn = self._make_learning(job["name"], tokenizer)
            if "problem" in self._process.ask(learn, LEARN_CPU_S):
                raise QueueFull("the process for schemas did not start")
            self._known.add(job["name"])
        result = self._process.ask(_write_line(job), job["cpu_s"])
        if self._process.has_ended():
            logger.warning("a schema was refused: %s", result["problem"])
        return result

    def _make_learning(self, name: str, tokenizer: Any) -> bytes:
        """Return the job that teaches a vocabulary; made once, as no other thread runs while it is made."""
        if name not in self._learning:
            job = {
                "do": "learn",
                "name": name,
                "tokenizer": tokenizer.backend_tokenizer.to_str(),
                "end_id": tokenizer.eos_token_id or 0,
                "cpu_s": LEARN_CPU_S,
            }
            self._learning[name] = _write_line(job)
            if len(self._learning) > MAX_VOCABULARIES:
                self._learning.popitem(last=False)
        return self._learning[name]


def _write_line(job: dict[str, Any]) -> bytes:
    return json.dumps(job).encode() + b"\n"


class _Process:
    """A process that tries schemas, one job at a time."""

    def __init__(self) -> None:
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "services.schemas.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **make_parent_variable(), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def ask(self, job: bytes, cpu_s: float) -> dict[str, Any]:
        """Return the result of a job; a job that ends the process is the problem.

        Args:
            job: a line of JSON.
            cpu_s: its budget.

        Raises:
            QueueFull: the job did not get its CPU seconds in time.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(job)
            self._process.stdin.flush()
            line = self._read_line()
        except BrokenPipeError:
            line = b""
        except TimeoutError:
            self.kill()
            raise QueueFull(f"the JSON schema was not checked within {MAX_WALL_S:g} s") from None
        if line:
            return json.loads(line)  # type: ignore[no-any-return]
        self.kill()
        if self._process.returncode == -signal.SIGPROF:
            return {"problem": f"the JSON schema takes more than {cpu_s:g} s of CPU time to check"}
        return {"problem": "the JSON schema takes too much memory to check"}

    def _read_line(self) -> bytes:
        """Return the next line, or an empty one if the process ended; TimeoutError after MAX_WALL_S."""
        assert self._process.stdout is not None
        pieces = b""
        while not pieces.endswith(b"\n"):
            ready, _, _ = select.select([self._process.stdout], [], [], MAX_WALL_S)
            if not ready:
                raise TimeoutError
            piece = os.read(self._process.stdout.fileno(), 65_536)
            if not piece:
                return b""
            pieces += piece
        return pieces
