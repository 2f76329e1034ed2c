"""Own user: middleware that answers only the user who runs the server, and root, while no key is needed."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from services import errors
from services.api.middleware import make_messages
from services.peers.owner import Address, OwnerUnknown, ask_kernel, find_slowly

PROBES = ("/livez", "/readyz", "/healthz")
ROOT = 0
MAX_WAITING = 64  # connections whose user is being looked for the slow way; any further one is refused
MAX_LOGGED = 100  # users and reasons that are logged, each once

Find = Callable[[Address, Address], int]
logger = logging.getLogger("services.peers")


class OwnUser:
    """Respond 403 to connections of other users of this machine, and of those whose user cannot be found.

    The user is looked up once a connection, at its first request that needs it.

    Args:
        is_needed: whether only the own user may ask now; False where every request needs a key.
        open_paths: answered to everyone.
        fix: what opens the server to others, for the message.
        find_fast: raises OwnerUnknown where `find_slowly` is to try; called in the event loop.
    """

    def __init__(
        self,
        app: ASGIApp,
        is_needed: Callable[[], bool] = lambda: True,
        open_paths: Collection[str] = PROBES,
        fix: str = "",
        find_fast: Find = ask_kernel,
        find_slowly: Find = find_slowly,
    ) -> None:
        self._app = app
        self._is_needed = is_needed
        self._open_paths = frozenset(open_paths)
        self._fix = fix
        self._find_fast = find_fast if sys.platform == "linux" else None
        self._find_slowly = find_slowly
        self._users = {os.geteuid(), ROOT}
        self._searches = ThreadPoolExecutor(1, thread_name_prefix="owner")
        self._waiting = 0
        self._logged: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or reject it."""
        if scope["type"] not in ("http", "websocket") or scope["path"] in self._open_paths:
            return await self._app(scope, receive, send)
        if not self._is_needed() or (problem := await self._find_problem(scope)) is None:
            return await self._app(scope, receive, send)
        self._log(problem)
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: 403
            return None
        for message in make_messages(errors.wrong_user(self._fix), Connection="close"):
            await send(message)
        return None

    async def _find_problem(self, scope: Scope) -> str | None:
        """Return why the connection is refused; None if it is the own user's."""
        connection = _get_connection(scope)
        if "problem" not in connection:
            connection["problem"] = await self._look_up(connection.get("peer"), connection.get("own"))
        problem: str | None = connection["problem"]
        return problem

    async def _look_up(self, peer: Any, own: Any) -> str | None:
        try:
            user = await self._find(tuple(peer[:2]), tuple(own[:2]))
        except OwnerUnknown as error:
            return f"the user of a connection cannot be found ({error})"
        except (TypeError, ValueError, IndexError):
            return "the user of a connection cannot be found (it is not one of TCP)"
        return None if user in self._users else f"a connection belongs to user {user}"

    async def _find(self, peer: Address, own: Address) -> int:
        if self._find_fast is not None:
            try:
                return self._find_fast(peer, own)
            except OwnerUnknown:
                pass
        if self._waiting >= MAX_WAITING:
            raise OwnerUnknown(f"{MAX_WAITING} others are looked for")
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._searches, self._find_slowly, peer, own)
        finally:
            self._waiting -= 1

    def _log(self, problem: str) -> None:
        if problem not in self._logged and len(self._logged) < MAX_LOGGED:
            self._logged.add(problem)
            logger.warning("requests are refused: %s; only user %d is answered", problem, os.geteuid())


def _get_connection(scope: Scope) -> dict[str, Any]:
    """Return what is known of the request's connection: by `services.api.heads`, else by the server.

    A server that believes proxies puts the proxied address into the scope; the heads' are the socket's.
    """
    known: dict[str, Any] | None = scope.get("state", {}).get("connection")
    return known if known is not None else {"peer": scope.get("client"), "own": scope.get("server")}
