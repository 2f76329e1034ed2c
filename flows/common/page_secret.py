"""The secret of the pages: what opens Prefect, MLflow and Evidently to the operator, and to no one else.

`make up` makes one at its start. Programs send it as a password (`Authorization: Basic`), a browser gets it
once as `?secret=…` and keeps it as a cookie, which is one for all ports of a host. It is kept in
`.perennial/server.json`, which only its owner can read.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Collection
from urllib.parse import parse_qsl, quote, urlencode

from starlette.types import ASGIApp, Receive, Scope, Send

USER = "perennial"
PARAMETER = "secret"
COOKIE = "perennial_secret"
SECRET_HEADER = b"evidently-secret"  # Evidently's own clients send it so


def make_secret() -> str:
    """Return a new secret: 192 random bits, safe in a URL."""
    return secrets.token_urlsafe(24)


def make_auth_string(secret: str) -> str:
    """Return `user:password`, as Prefect's PREFECT_API_AUTH_STRING has it."""
    return f"{USER}:{secret}"


def make_header(secret: str) -> str:
    """Return the value of the header Authorization."""
    return encode_auth_string(make_auth_string(secret))


def encode_auth_string(auth_string: str) -> str:
    """Return `user:password` as the value of the header Authorization."""
    return "Basic " + base64.b64encode(auth_string.encode()).decode()


def make_link(page: str, secret: str) -> str:
    """Return a link that opens a page and, by its cookie, the others of its host."""
    return f"{page}?{urlencode({PARAMETER: secret})}"


class PageSecret:
    """Let in who knows the secret; give a browser that brings it in the URL a cookie.

    What is let in by cookie gets the header Authorization, for an application that asks for it itself.

    Args:
        open_paths: of probes, which need no secret.
        otherwise: answers requests without the secret; None: they get a 401.
    """

    def __init__(
        self, app: ASGIApp, secret: str, open_paths: Collection[str] = (), otherwise: ASGIApp | None = None
    ) -> None:
        self._app = app
        self._secret = secret.encode()
        self._header = make_header(secret).encode()
        # Not the secret itself: a cookie goes to every port of the host that the operator opens.
        self._cookie = hashlib.sha256(b"cookie of " + self._secret).hexdigest()
        self._open_paths = frozenset(open_paths)
        self._otherwise = otherwise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or ask for the secret."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if scope["method"] == "GET" and (query := self._split_query(scope)) is not None:
            return await self._give_cookie(scope, query, send)
        if self._is_let_in(scope):
            return await self._app({**scope, "headers": self._add_header(scope)}, receive, send)
        if self._otherwise is not None:
            return await self._otherwise(scope, receive, send)
        if scope["path"] in self._open_paths and scope["method"] in ("GET", "HEAD"):
            return await self._app(scope, receive, send)
        return await _ask_for_secret(send)

    def _split_query(self, scope: Scope) -> str | None:
        """Return the query without the secret, if the right one is there."""
        fields = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = [value for name, value in fields if name == PARAMETER]
        if not any(self._is_secret(value) for value in given):
            return None
        return urlencode([(name, value) for name, value in fields if name != PARAMETER])

    def _is_let_in(self, scope: Scope) -> bool:
        return any(
            (name == b"authorization" and self._is_right(value))
            or (name == SECRET_HEADER and self._is_secret(value.decode("latin-1")))
            or (name == b"cookie" and self._has_cookie(value))
            for name, value in scope["headers"]
        )

    def _is_right(self, value: bytes) -> bool:
        scheme, _, given = value.decode("latin-1").partition(" ")
        if scheme.lower() == "bearer":
            return self._is_secret(given.strip())
        try:
            decoded = base64.b64decode(given.strip(), validate=True).decode()
        except (binascii.Error, ValueError):
            return False
        return scheme.lower() == "basic" and self._is_secret(decoded.partition(":")[2])

    def _is_secret(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._secret)

    def _has_cookie(self, value: bytes) -> bool:
        # Not by SimpleCookie: one odd cookie of another program on this host, and it finds none.
        pairs = (pair.strip().partition("=") for pair in value.decode("latin-1").split(";"))
        return any(
            name == COOKIE and hmac.compare_digest(given.encode(), self._cookie.encode())
            for name, _, given in pairs
        )

    def _add_header(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        others = [(name, value) for name, value in scope["headers"] if name != b"authorization"]
        return [*others, (b"authorization", self._header)]

    async def _give_cookie(self, scope: Scope, query: str, send: Send) -> None:
        path = "/" + quote(scope["path"].lstrip("/"))  # never "//": that would be another host
        cookie = f"{COOKIE}={self._cookie}; Path=/; HttpOnly; SameSite=Lax"
        headers = [
            (b"location", (path + (f"?{query}" if query else "")).encode()),
            (b"set-cookie", cookie.encode()),
            (b"cache-control", b"no-store"),
            (b"referrer-policy", b"no-referrer"),
            (b"content-length", b"0"),
        ]
        await send({"type": "http.response.start", "status": 303, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


async def _ask_for_secret(send: Send) -> None:
    text = (
        b"This page needs the secret of `make up`.\n"
        b"fix: open the link that `make up` printed when it started; or give the secret as the password "
        b"(any user name). It is the last part of auth_string in .perennial/server.json.\n"
    )
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(text)).encode()),
        (b"www-authenticate", b'Basic realm="Perennial", charset="UTF-8"'),
        (b"cache-control", b"no-store"),
    ]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": text})
