"""Same origin: middleware that rejects what a page of another site makes a browser send.

A browser sends a request of any page to any address, this machine's own among them. Three things give such a
request away: its Host is not a name of this server (the page's own name was pointed at this machine, DNS
rebinding), its Origin is another one, or it is a POST of a type that needs no preflight.
"""

from __future__ import annotations

import ipaddress
import json
import re
import socket
from collections.abc import Callable, Collection
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
# A page may send these to any origin without asking first; no type at all counts as one of them.
SIMPLE_TYPES = frozenset({"", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"})
READING = frozenset({"GET", "HEAD"})


class SameOrigin:
    """Reject requests to other hosts (403), of other origins (403), and POSTs of simple types (415).

    Args:
        hosts: names of this server besides those of loopback: `name`, or `name:port` for one port only.
        is_public: whether other machines can reach the server; then its addresses and the machine's own name
            are names of it too. (An address cannot be rebound.)
        setting: what to set for a further name, for the message.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: Collection[str] = (),
        is_public: Callable[[], bool] = lambda: False,
        setting: str = "",
    ) -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in hosts)
        self._is_public = is_public
        self._setting = setting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or reject it."""
        if scope["type"] not in ("http", "websocket") or (problem := self._find_problem(scope)) is None:
            return await self._app(scope, receive, send)
        status, code, message = problem
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: 403
            return None
        return await _reject(status, code, message, send)

    def _find_problem(self, scope: Scope) -> tuple[int, str, str] | None:
        """Return status, code and message of a request to reject; None for any other."""
        names = _read(scope, b"host")
        if any(not self._is_own(name) for name in names) or len(names) > 1:
            fix = f" Add it to {self._setting} if it is one." if self._setting else ""
            return 403, "wrong_host", f"{names[0][:200]!r} is not a name of this server.{fix}"
        for origin in _read(scope, b"origin"):
            if not self._is_same(origin, names[0] if names else ""):
                return 403, "wrong_origin", f"Requests of pages of {origin[:200]!r} are not answered here."
        if scope["type"] == "websocket" or scope["method"] in READING:
            return None
        if {"cross-site", "same-site"} & {*_read(scope, b"sec-fetch-site")}:
            return 403, "wrong_origin", "Requests of pages of another origin are not answered here."
        if scope["method"] == "POST" and _has_body(scope):
            kinds = _read(scope, b"content-type") or [""]
            if any(kind.partition(";")[0].strip() in SIMPLE_TYPES for kind in kinds):
                message = f"The Content-Type is {kinds[0][:100]!r}; send the body as application/json."
                return 415, "wrong_content_type", message
        return None

    def _is_own(self, host: str) -> bool:
        name, _ = _split_port(host)
        if name in LOOPBACK_NAMES or host in self._hosts or name in self._hosts:
            return True
        return self._is_public() and (_is_address(name) or name == socket.gethostname().lower())

    def _is_same(self, origin: str, host: str) -> bool:
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False
        if parts.scheme not in ("http", "https") or not parts.netloc:
            return False  # "null": a file, a sandboxed frame
        return parts.netloc == host or parts.netloc in self._hosts


def _read(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1").strip().lower() for key, value in scope["headers"] if key == name]


def _split_port(host: str) -> tuple[str, str]:
    found = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^:@/\[\]]+)(?::(\d{1,5}))?", host)
    return (found[1], found[2] or "") if found else ("", "")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _has_body(scope: Scope) -> bool:
    return bool(_read(scope, b"transfer-encoding")) or _read(scope, b"content-length") not in ([], ["0"])


async def _reject(status: int, code: str, message: str, send: Send) -> None:
    """Respond with an error in OpenAI's format."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    content = json.dumps({"error": error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"connection", b"close"),  # the body was not read
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
