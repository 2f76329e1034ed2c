"""A thread that decodes many sequences together, and the way of their tokens to the asyncio loop.

What an engine adds: how a request enters, how one step is computed, how a request leaves. All that happens in
the engine's own thread. The loop is woken once a step for all requests together: a wake-up for each token of
each request costs more than a step of a small model.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from services.engines.protocol import ContextOverflow, EngineError, Load, QueueFull, Sampling, Step

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Request:
    """One answer being written.

    Attributes:
        max_tokens: where it is cut, the rest of the context considered.
        state: what the engine keeps of it; belongs to the engine's thread once the request has entered.
    """

    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    loop: asyncio.AbstractEventLoop
    state: Any = None
    submitted_at: float = field(default_factory=time.monotonic)
    entered_at: float | None = None
    items: deque[Step | Exception] = field(default_factory=deque)
    waiter: asyncio.Future[None] | None = None
    ended: bool = False


StepResult = tuple[Request, Step | Exception]


class Worker(ABC):
    """The common part of engines that compute in a thread of this process.

    Args:
        context_tokens: prompt and answer together.
        max_running: sequences decoded together.
        max_waiting: requests beyond them that may wait; one more is refused with QueueFull.
        end_ids: tokens that end an answer.
    """

    name = "worker"

    def __init__(
        self, *, context_tokens: int, max_running: int, max_waiting: int, end_ids: Sequence[int]
    ) -> None:
        self.context_tokens = context_tokens
        self.max_running = max_running
        self._max_waiting = max_waiting
        self._end_ids = frozenset(end_ids)
        self._wake = threading.Condition()
        self._waiting: deque[Request] = deque()
        self._running: dict[int, Request] = {}  # by id(request)
        self._leaving: list[Request] = []
        self._closed = False
        self._broken: str | None = None
        self._thread: threading.Thread | None = None

    # What an engine defines. All but `_prepare` run in the engine's thread.

    def _prepare(self, sampling: Sampling) -> Any:
        """Return the state of a new request; compiles its schema. May run in any thread."""
        return None

    @abstractmethod
    def _enter(self, request: Request) -> None:
        """Begin to write the answer to a request."""

    @abstractmethod
    def _leave(self, request: Request) -> None:
        """Free what a request holds before its end."""

    @abstractmethod
    def _advance(self, running: Sequence[Request]) -> list[StepResult]:
        """Compute one step and return what is new."""

    def _end(self, left: Sequence[Request]) -> None:
        """Free what the engine and these requests, which have not ended, hold."""
        return  # an engine may hold nothing

    # The engine protocol.

    @property
    def broken(self) -> str | None:
        """Return why the engine takes no more requests, or None."""
        return self._broken

    def load(self) -> Load:
        """Return how many requests wait and run."""
        with self._wake:
            return Load(len(self._waiting), len(self._running))

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncIterator[Step]:
        """Write an answer to a prompt; see `Engine.generate`."""
        room = self.context_tokens - len(prompt)
        if room < 1 or not prompt:
            raise ContextOverflow(
                f"the prompt takes {len(prompt)} tokens; with its answer it may take {self.context_tokens}"
            )
        if sampling.json_schema is None:
            state = self._prepare(sampling)
        else:  # compiling a schema takes up to a tenth of a second: the loop goes on meanwhile
            state = await asyncio.to_thread(self._prepare, sampling)
        loop = asyncio.get_running_loop()
        request = Request(list(prompt), sampling, min(sampling.max_tokens, room), loop, state)
        self._submit(request)
        try:
            while True:
                while not request.items:
                    request.waiter = loop.create_future()
                    await request.waiter
                item = request.items.popleft()
                if isinstance(item, Exception):
                    raise item
                if request.entered_at is not None:  # told once, with the first step
                    item = replace(item, queue_s=request.entered_at - request.submitted_at)
                    request.entered_at = None
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            self._abort(request)

    def close(self) -> None:
        """End the engine's thread; callers that still wait get EngineError."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    # Between the loop and the thread.

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name=f"engine-{self.name}", daemon=True)
        self._thread.start()

    def _submit(self, request: Request) -> None:
        with self._wake:
            if self._broken or self._closed:
                raise EngineError(self._broken or "the engine is closed")
            if len(self._waiting) + len(self._running) >= self.max_running + self._max_waiting:
                raise QueueFull(f"{len(self._running)} requests run and {len(self._waiting)} wait already")
            self._waiting.append(request)
            self._wake.notify()

    def _abort(self, request: Request) -> None:
        with self._wake:
            if request.ended:
                return
            request.ended = True
            if id(request) in self._running:
                self._leaving.append(request)
                self._wake.notify()
            elif request in self._waiting:
                self._waiting.remove(request)

    def _run(self) -> None:
        reason = "the engine is closed"
        try:
            while self._step():
                pass
        except BaseException as error:  # whatever it is: nobody may wait for a thread that is gone
            reason = f"the engine broke: {error}"
            log.exception("Engine %s broke", self.name)
        with self._wake:
            self._broken = reason
            running, waiting = list(self._running.values()), list(self._waiting)
            self._running.clear()
            self._waiting.clear()
        self._deliver([(request, EngineError(reason)) for request in (*running, *waiting)])
        self._end(running)

    def _step(self) -> bool:
        """Take in, let out, compute one step; return False once the engine is closed."""
        with self._wake:
            while not (self._waiting or self._running or self._closed):
                self._wake.wait()
            if self._closed:
                return False
            # Those that ended in the meantime hold nothing any more.
            leaving = [r for r in self._leaving if self._running.pop(id(r), None) is not None]
            self._leaving = []
            entering = []
            while self._waiting and len(self._running) < self.max_running:
                request = self._waiting.popleft()
                self._running[id(request)] = request
                request.entered_at = time.monotonic()
                entering.append(request)
        for request in leaving:
            self._leave(request)
        for request in entering:
            self._enter(request)
        if self._running or leaving:  # what has left is freed in a step
            self._deliver(self._advance(list(self._running.values())))
        return True

    def _deliver(self, results: list[StepResult]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[StepResult]] = {}
        with self._wake:
            for request, item in results:
                if isinstance(item, Exception) or item.finish_reason is not None:
                    self._running.pop(id(request), None)
                    request.ended = True
                by_loop.setdefault(request.loop, []).append((request, item))
        for loop, together in by_loop.items():
            try:
                loop.call_soon_threadsafe(_hand_over, together)
            except RuntimeError:  # the loop is closed: nobody reads these answers
                for request, _ in together:
                    self._abort(request)


def _hand_over(results: list[StepResult]) -> None:
    for request, item in results:
        request.items.append(item)
        if request.waiter is not None and not request.waiter.done():
            request.waiter.set_result(None)
