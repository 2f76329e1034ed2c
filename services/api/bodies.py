"""Middleware that reads bodies: how large one may be, how long it may take, and who may send one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services import errors
from services.api.middleware import make_messages
from services.errors import ApiError

MAX_HELD_BYTES = 64 * 2**20  # of all bodies that are still arriving
MAX_DRAINED_BYTES = 64 * 2**20  # of a body that is read only to be thrown away

CheckKey = Callable[[Scope], None]


@dataclass(slots=True, eq=False)
class _Body:
    """A body that is still arriving; `limit` ends the wait for it."""

    limit: asyncio.Timeout
    content: bytearray = field(default_factory=bytearray)


class BodyLimit:
    """Read the whole body before the request counts, or respond 413 or 408.

    Bodies are small (one conversation) and every route needs all of it, so reading it first costs nothing. If
    bodies that are still arriving hold too much memory together, the oldest is ended: an honest client
    needs milliseconds.

    Args:
        max_bytes: of one body.
        timeout_s: time for a body to arrive, in seconds.
        check_key: raises ApiError for a request that would be rejected for its key, whatever its body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float, check_key: CheckKey) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._check_key = check_key
        self._max_held = max(MAX_HELD_BYTES, 2 * max_bytes)
        self._held = 0
        self._arriving: dict[int, _Body] = {}  # by id, the oldest first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its whole body, or reject it."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self._app(scope, receive, send)
        try:
            self._check_key(scope)
            if _read_length(scope) > self._max_bytes:
                raise errors.request_too_large(self._max_bytes)
            body = await self._read(receive)
        except ApiError as error:
            return await self._reject(error, scope, receive, send)
        return await self._app(scope, replay_body(body, receive), send)

    async def _read(self, receive: Receive) -> bytes:
        try:
            async with asyncio.timeout(self._timeout_s) as limit:
                body = _Body(limit)
                self._arriving[id(body)] = body
                try:
                    await self._receive(body, receive)
                finally:
                    self._forget(body)
        except TimeoutError:
            raise errors.body_timed_out(self._timeout_s) from None
        return bytes(body.content)

    async def _receive(self, body: _Body, receive: Receive) -> None:
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise errors.invalid_json("it ended before it was complete")
            piece = message.get("body", b"")
            body.content += piece
            if id(body) in self._arriving:
                self._held += len(piece)
            if len(body.content) > self._max_bytes:
                raise errors.request_too_large(self._max_bytes)
            if not message.get("more_body"):
                return
            while self._held > self._max_held:
                oldest = next(iter(self._arriving.values()))
                self._forget(oldest)
                oldest.limit.reschedule(asyncio.get_running_loop().time())

    def _forget(self, body: _Body) -> None:
        if self._arriving.pop(id(body), None) is not None:
            self._held -= len(body.content)

    async def _reject(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond, then read what still arrives: a client that writes before it reads would get a reset."""
        start, content = make_messages(error, Connection="close")
        await send(start)
        await send({**content, "more_body": True})
        if not _waits_to_send(scope):
            with suppress(TimeoutError):
                async with asyncio.timeout(self._timeout_s):
                    await _drain(receive)
        await send({"type": "http.response.body", "body": b""})


async def _drain(receive: Receive) -> None:
    left = MAX_DRAINED_BYTES
    while left > 0:
        message = await receive()
        if message["type"] != "http.request" or not message.get("more_body"):
            return
        left -= len(message.get("body", b""))


def _read_length(scope: Scope) -> int:
    value = dict(scope["headers"]).get(b"content-length", b"0")
    return int(value) if value.isdigit() and len(value) < 20 else 0


def _waits_to_send(scope: Scope) -> bool:
    """Return whether the client sends no body before it is told to (RFC 9110 10.1.1)."""
    return bool(dict(scope["headers"]).get(b"expect", b"").lower() == b"100-continue")


def replay_body(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a body that was read already, and then what `receive` gives."""
    unread = True

    async def again() -> Message:
        nonlocal unread
        if unread:
            unread = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again
