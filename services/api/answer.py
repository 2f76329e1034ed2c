"""The response to one request: its answers as one JSON body or as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Protocol

from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from services.answering.handler import ChatHandler
from services.answering.request import Delta, GenerationRequest
from services.errors import ApiError
from services.model_pool import LoadedModel, Route

STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would buffer the chunks
}
MAX_AT_ONCE = 8  # prompts of one request in the engine, so that a list leaves room for other requests
MAX_UNSENT = 64  # pieces of answers that wait for a slow client

Answers = AsyncGenerator[
    tuple[int, Delta]
]  # the place of the prompt in the request, and a piece of its answer


class Formatter(Protocol):
    """Formats the answers to one request; each has the place of its prompt."""

    def format_opening(self, first: Delta, place: int = 0) -> bytes:
        """Return what a stream has before the first piece of an answer."""
        ...

    def format_chunk(self, delta: Delta, place: int = 0) -> bytes:
        """Return a piece of a streamed answer."""
        ...

    def format_end(self) -> bytes:
        """Return what a stream has after all answers."""
        ...

    def format_error(self, error: ApiError) -> bytes:
        """Return what a stream ends with that fails."""
        ...

    def format_whole(self, answers: Sequence[Sequence[Delta]]) -> bytes:
        """Return the body of a response that is not streamed."""
        ...


MakeFormatter = Callable[[LoadedModel], Formatter]


class AnswerResponse(Response):
    """The answers to the prompts of one request, as one JSON body or as server-sent events.

    If the client disconnects, generation is cancelled at once, even while the request is still queued.

    Args:
        requests: one a prompt; the first has the id of the response.
    """

    def __init__(
        self,
        handler: ChatHandler,
        requests: Sequence[GenerationRequest],
        make_formatter: MakeFormatter,
        stream: bool,
    ) -> None:
        super().__init__()
        self._handler = handler
        self._requests = requests
        self._make_formatter = make_formatter
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answers."""
        work = asyncio.ensure_future(self._respond(scope, receive, send))
        gone = asyncio.ensure_future(_wait_for_disconnect(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                work.cancel()
            await work
        except (asyncio.CancelledError, OSError):
            if not gone.done():
                raise
        finally:
            work.cancel()
            gone.cancel()

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = self._requests[0]
        try:
            route = self._handler.pool.route(request.model, request.assignment_key)
            formatter = self._make_formatter(route.model)
            async with aclosing(self._generate(route)) as answers:
                first = await anext(answers)
                if self._stream:
                    await self._send_stream(formatter, first, answers, send)
                    return
                whole: list[list[Delta]] = [[] for _ in self._requests]
                whole[first[0]].append(first[1])
                async for place, delta in answers:
                    whole[place].append(delta)
        except ApiError as error:
            await make_error_response(error, request.request_id)(scope, receive, send)
            return
        headers = {"X-Request-Id": request.request_id}
        if request.sampling.logprobs is None:
            content = formatter.format_whole(whole)
        else:  # of a whole prompt they are megabytes, and others are not to wait for their formatting
            content = await asyncio.to_thread(formatter.format_whole, whole)
        response = Response(content, 200, headers, "application/json")
        await response(scope, receive, send)

    async def _generate(self, route: Route) -> Answers:
        """Yield the pieces of all answers as they come."""
        if len(self._requests) == 1:
            async with aclosing(self._handler.generate(self._requests[0], route)) as deltas:
                async for delta in deltas:
                    yield 0, delta
            return
        room = asyncio.Semaphore(MAX_AT_ONCE)
        pieces: asyncio.Queue[tuple[int, Delta | Exception]] = asyncio.Queue(MAX_UNSENT)

        async def answer(place: int, request: GenerationRequest) -> None:
            try:
                async with room, aclosing(self._handler.generate(request, route)) as deltas:
                    async for delta in deltas:
                        await pieces.put((place, delta))
            except Exception as error:
                await pieces.put((place, error))

        tasks = [asyncio.create_task(answer(*numbered)) for numbered in enumerate(self._requests)]
        unfinished = len(tasks)
        try:
            while unfinished:
                place, piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                unfinished -= piece.finish_reason is not None
                yield place, piece
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send_stream(
        self, formatter: Formatter, first: tuple[int, Delta], answers: Answers, send: Send
    ) -> None:
        headers = {**STREAM_HEADERS, "X-Request-Id": self._requests[0].request_id}
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        (place, delta), unfinished = first, len(self._requests)
        opened: set[int] = set()
        try:
            while True:
                chunk = b"" if place in opened else formatter.format_opening(delta, place)
                opened.add(place)
                if delta.echo is None:
                    chunk += formatter.format_chunk(delta, place)
                else:
                    chunk += await asyncio.to_thread(formatter.format_chunk, delta, place)
                unfinished -= delta.finish_reason is not None
                if not unfinished:
                    end = chunk + formatter.format_end()
                    break
                await _send_body(send, chunk)
                place, delta = await anext(answers)
        except ApiError as error:  # the status is sent already, so the stream ends with the error
            end = formatter.format_error(error)
        await _send_body(send, end, more=False)


async def _send_body(send: Send, body: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def make_error_response(error: ApiError, request_id: str | None = None) -> JSONResponse:
    """Return an error in OpenAI's format."""
    headers = error.headers()
    if request_id:
        headers["X-Request-Id"] = request_id
    return JSONResponse(error.body(), error.status, headers)
