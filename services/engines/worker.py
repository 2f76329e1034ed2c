"""Base class of engines that decode in a thread of this process, and deliver tokens to the event loop.

An engine defines how a request enters, how a step is computed, and how a request leaves, all in the engine's
thread. The event loop is woken once per step for all requests: a wake-up per token of each request would cost
more than a step of a small model.

What fails for one request ends that request. Only a failed step of the model, shared by all, ends the engine.
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

from services.engines.grammar import compile_apart
from services.engines.protocol import (
    ContextOverflow,
    EngineError,
    Load,
    QueueFull,
    Sampling,
    SchemaUnsupported,
    Step,
    Unsupported,
)

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Request:
    """A request to the engine, and the results that its caller has not read yet.

    Attributes:
        max_tokens: length at which the answer is cut; fits into the context.
        state: the engine's own; used only by the engine's thread once the request has entered.
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
    """An engine that computes in a thread of this process.

    Args:
        context_tokens: limit of prompt and answer together.
        max_running: sequences decoded together.
        max_waiting: requests that may wait beyond those; more are rejected with QueueFull.
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

    # Defined by each engine. All but `_prepare` run in the engine's thread.

    def _prepare(self, sampling: Sampling) -> Any:
        """Return the state of a new request, its schema compiled. May run in any thread."""
        return None

    @abstractmethod
    def _enter(self, request: Request) -> None:
        """Start a request; whatever this raises ends the request alone, so it must leave nothing behind."""

    @abstractmethod
    def _leave(self, request: Request) -> None:
        """Free the resources of a request that is cancelled."""

    @abstractmethod
    def _advance(self, running: Sequence[Request]) -> list[StepResult]:
        """Compute one step; return the new tokens, or for a request that failed alone the exception."""

    def _end(self, left: Sequence[Request]) -> None:
        """Free the resources of the engine and of these unfinished requests."""
        return  # an engine may have none

    # The engine protocol.

    @property
    def broken(self) -> str | None:
        """Why the engine accepts no more requests; None while it works."""
        return self._broken

    def load(self) -> Load:
        """Return the numbers of queued and running requests."""
        with self._wake:
            return Load(len(self._waiting), len(self._running))

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncIterator[Step]:
        """Generate an answer to a prompt; see `Engine.generate`."""
        room = self.context_tokens - len(prompt)
        if room < 1 or not prompt:
            raise ContextOverflow(
                f"the prompt has {len(prompt)} tokens, and the context {self.context_tokens} with the answer"
            )
        try:
            if sampling.is_constrained:
                state = await compile_apart(self._prepare, sampling)
            else:
                state = self._prepare(sampling)
        except Exception as error:
            raise make_failure(error) from error
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
                if request.entered_at is not None:  # reported once, with the first step
                    item = replace(item, queue_s=request.entered_at - request.submitted_at)
                    request.entered_at = None
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            self._abort(request)

    def close(self) -> None:
        """Stop the engine; callers that still wait get EngineError."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    # Between the event loop and the thread.

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
        except BaseException as error:  # whatever it is, no caller may wait for a dead thread
            reason = f"the engine failed: {error}"
            logger.exception("the engine %s failed", self.name)
        with self._wake:
            self._broken = reason
            running, waiting = list(self._running.values()), list(self._waiting)
            self._running.clear()
            self._waiting.clear()
        self._deliver([(request, EngineError(reason)) for request in (*running, *waiting)])
        self._end(running)

    def _step(self) -> bool:
        """Admit and remove requests, and compute one step; return False once the engine is closed."""
        with self._wake:
            while not (self._waiting or self._running or self._closed):
                self._wake.wait()
            if self._closed:
                return False
            # Requests that ended in the meantime hold no resources.
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
        self._deliver([failed for request in entering if (failed := self._try_enter(request))])
        if self._running or leaving:  # resources of cancelled requests are freed in a step
            self._deliver(self._advance(list(self._running.values())))
        return True

    def _try_enter(self, request: Request) -> StepResult | None:
        """Start a request; return its failure, if any."""
        try:
            self._enter(request)
        except Exception as error:
            return request, make_failure(error)
        return None

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
            except RuntimeError:  # the loop is closed, so these answers have no reader
                for request, _ in together:
                    self._abort(request)


def make_failure(error: Exception) -> Exception:
    """Return what the caller of one failed request gets; an unforeseen one is logged with its traceback."""
    if isinstance(error, SchemaUnsupported | Unsupported | EngineError):
        return error
    logger.error("one request failed", exc_info=error)
    return EngineError(f"the request failed: {error!r}")


def _hand_over(results: list[StepResult]) -> None:
    for request, item in results:
        request.items.append(item)
        if request.waiter is not None and not request.waiter.done():
            request.waiter.set_result(None)
