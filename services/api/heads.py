"""The head of a request: how long it may take to arrive, and how large it may be.

Uvicorn waits for a head without end, and so for a client that sends half of one, or nothing. Each such
connection is a file descriptor, and a process that has none left answers no one.
"""

from __future__ import annotations

import asyncio
from typing import Any

MAX_HEAD_BYTES = 65_536  # as h11's limit; httptools has none


class _TimedHead(asyncio.Protocol):
    """Closes a connection whose next head does not arrive in time; in front of one of Uvicorn's protocols.

    The time counts from the connection, or from the first byte after a response: between the two, Uvicorn's
    own limit for idle connections holds.
    """

    timeout_s: float
    cycle: Any  # Uvicorn's, of the last request whose head is complete
    app_state: dict[str, Any]  # Uvicorn's, of which every request gets a copy
    _timer: asyncio.TimerHandle | None = None
    _transport: asyncio.BaseTransport
    _head_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._transport = transport
        # The socket's own addresses, whatever a proxy names; `services.peers` keeps what it finds here too.
        ends = {"peer": transport.get_extra_info("peername"), "own": transport.get_extra_info("sockname")}
        self.app_state = {**self.app_state, "connection": ends}
        self._start()

    def data_received(self, data: bytes) -> None:
        last = self.cycle
        if self._timer is None and (last is None or last.response_complete):
            self._start()
        super().data_received(data)
        if self.cycle is not last:
            self._stop()
        elif self._timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _start(self) -> None:
        self._head_bytes = 0
        self._timer = asyncio.get_running_loop().call_later(self.timeout_s, self._close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        self._stop()
        self._transport.close()


def make_protocol(timeout_s: float) -> type[asyncio.Protocol]:
    """Return Uvicorn's protocol, which gives the head of a request `timeout_s` seconds to arrive."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    return type("TimedHead", (_TimedHead, AutoHTTPProtocol), {"timeout_s": timeout_s})
