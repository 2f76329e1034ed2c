"""Middleware: request ids, deadline, load shedding; and whether the service is reachable from outside."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services import errors
from services.answering.deadline import DEADLINE
from services.answering.request import make_request_id
from services.errors import ApiError


class ConcurrencyLimit:
    """Load shedding: respond 429 at once, before the body is parsed, while `limit` requests are in progress.

    Under overload a rejection must be almost free, or rejections take the time that answers need. A request
    counts from when its body has arrived (`BodyLimit` comes first), so that no slow client holds a place.
    """

    def __init__(self, app: ASGIApp, paths: Collection[str], limit: int) -> None:
        self._app = app
        self._paths = frozenset(paths)
        self._limit = limit
        self._in_progress = 0
        self._rejection = make_messages(errors.overloaded(retry_after_s=1.0))

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


class RequestIds:
    """Give every request an id, and every response the header X-Request-Id with it.

    Routes read the id as `request.state.request_id`; the event store has the answer under the same id.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with an id."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request_id = make_request_id()
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                if not any(name.lower() == b"x-request-id" for name, _ in headers):
                    message = {**message, "headers": [*headers, (b"x-request-id", request_id.encode())]}
            await send(message)

        return await self._app(scope, receive, send_named)


class _Stalled(OSError):
    """The client does not read what is sent to it."""


class Deadline:
    """Respond 504 where no response has begun in time, and end one whose client does not read it.

    Args:
        timeout_s: until the first byte of the response, in seconds.
        stall_s: that the client may leave a piece of the response unread, in seconds.
    """

    def __init__(self, app: ASGIApp, timeout_s: float, stall_s: float) -> None:
        self._app = app
        self._timeout_s = timeout_s
        self._stall_s = stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and end it at the deadline."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_in_time(message: Message) -> None:
            limit.reschedule(None)
            try:
                async with asyncio.timeout(self._stall_s):
                    await send(message)
            except TimeoutError:
                raise _Stalled from None

        try:
            async with asyncio.timeout(self._timeout_s) as limit:
                DEADLINE.set(limit)
                await self._app(scope, receive, send_in_time)
        except _Stalled:
            return None  # the server closes a connection whose response is incomplete
        except TimeoutError:
            if not limit.expired():
                raise
            for message in make_messages(errors.timed_out(self._timeout_s)):
                await send(message)


def make_messages(error: ApiError, **headers: str) -> tuple[Message, Message]:
    """Return the two ASGI messages of an error response."""
    content = json.dumps(error.body()).encode()
    named = {"Content-Type": "application/json", "Content-Length": str(len(content)), **error.headers()}
    raw = [(name.lower().encode(), value.encode()) for name, value in {**named, **headers}.items()]
    start: Message = {"type": "http.response.start", "status": error.status, "headers": raw}
    return start, {"type": "http.response.body", "body": content}


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
