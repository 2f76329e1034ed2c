"""What stands between the network and the routes: the size of a body, and where the service listens."""

from __future__ import annotations

import ipaddress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services import errors


class BodyLimit:
    """Reads a body whole, or answers 413: no route ever sees more than `max_bytes`.

    Bodies are small (a conversation) and every route needs all of one, so nothing is lost by waiting for it.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its body in one piece, or refuse it."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self._app(scope, receive, send)
        body = None if self._declared(scope) > self._max_bytes else await self._read(receive)
        if body is None:
            return await self._refuse(send)
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

    async def _refuse(self, send: Send) -> None:
        import json

        error = errors.request_too_large(self._max_bytes)
        body = json.dumps(error.body()).encode()
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


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
    """Return whether this process listens where other machines can reach it, whoever opened the socket.

    BentoML's parent process opens it and hands it down, with an address from the command line that the
    service is not told of.
    """
    import psutil

    listening = [
        connection.laddr.ip
        for connection in psutil.Process().net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    return any(not ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in listening)
