"""Middleware: load shedding and body size limits; and whether the service is reachable from outside."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Collection
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services import errors


class ConcurrencyLimit:
    """Load shedding: respond 429 at once, before the body is read, while `limit` requests are in progress.

    Under overload a rejection must be almost free, or rejections take the time that answers need.
    """

    def __init__(self, app: ASGIApp, paths: Collection[str], limit: int) -> None:
        self._app = app
        self._paths = frozenset(paths)
        self._limit = limit
        self._in_progress = 0
        error = errors.overloaded(retry_after_s=1.0)
        self._rejection = _make_response(error.status, error.body(), error.headers())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or reject it."""
        if scope["type"] != "http" or scope["path"] not in self._paths:
            return await self._app(scope, receive, send)
        if self._in_progress >= self._limit:
            for message in self._rejection:
                await send(message)
            return None
        self._in_progress += 1
        try:
            return await self._app(scope, receive, send)
        finally:
            self._in_progress -= 1


class BodyLimit:
    """Read the whole body, or respond 413: no route sees more than `max_bytes`.

    Bodies are small (one conversation) and every route needs all of it, so reading it first costs nothing.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its whole body, or reject it."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self._app(scope, receive, send)
        body = None if self._declared(scope) > self._max_bytes else await self._read(receive)
        if body is None:
            return await self._reject(send)
        return await self._app(scope, _replay(body, receive), send)

    @staticmethod
    def _declared(scope: Scope) -> int:
        value = dict(scope["headers"]).get(b"content-length", b"0")
        return int(value) if value.isdigit() else 0

    async def _read(self, receive: Receive) -> bytes | None:
        pieces: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return b"".join(pieces)
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > self._max_bytes:
                return None
            if not message.get("more_body"):
                return b"".join(pieces)

    async def _reject(self, send: Send) -> None:
        error = errors.request_too_large(self._max_bytes)
        for message in _make_response(error.status, error.body(), {"Connection": "close"}):
            await send(message)


def _make_response(status: int, body: dict[str, Any], headers: dict[str, str]) -> tuple[Message, Message]:
    """Return the two ASGI messages of a JSON response."""
    content = json.dumps(body).encode()
    named = {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in named.items()]
    start: Message = {"type": "http.response.start", "status": status, "headers": raw}
    return start, {"type": "http.response.body", "body": content}


def _replay(body: bytes, receive: Receive) -> Receive:
    unread = True

    async def again() -> Message:
        nonlocal unread
        if unread:
            unread = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again


def listens_beyond_loopback() -> bool:
    """Return whether this process listens on an address that other machines can reach.

    Checks the sockets themselves: BentoML's parent process opens them, with an address from its command line
    that the service does not see.
    """
    import psutil

    listening = [
        connection.laddr.ip
        for connection in psutil.Process().net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    return any(not ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in listening)
