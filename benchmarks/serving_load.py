"""Closed-loop load on a server: each client sends its next request once it is answered (keep-alive HTTP/1.1).

Server and clients share the cores, so during the run the clients only record the times and the bytes of an
answer; the answers are parsed after the run.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

ANSWER_WITHIN_S = 180.0
FIRST_TEXT = re.compile(rb'"(?:content|text)": ?"[^"]')
HEAD_END = b"\r\n\r\n"
LAST_CHUNK = b"\r\n0\r\n\r\n"
DONE = b"data: [DONE]"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one row; times are of the monotonic clock, s.

    Attributes:
        status: of HTTP; 0 if the connection broke or nothing came in time.
        first: when the first text arrived; None without text.
        whole: whether all of it arrived: `data: [DONE]`, or every byte of the body.
        version: of the model that answered (`system_fingerprint`).
        error: the error object of a refusal.
    """

    row: int
    status: int
    sent: float
    first: float | None
    ended: float
    text: str
    whole: bool = True
    finish_reason: str | None = None
    request_id: str | None = None
    version: str | None = None
    retry_after: str | None = None
    error: Any = None

    @property
    def ok(self) -> bool:
        """Whether it is a complete answer."""
        return self.status == 200 and self.whole and self.error is None


@dataclass(slots=True)
class Reply:
    """The bytes of one answer as they arrived."""

    row: int
    sent: float
    first: float | None = None
    ended: float = 0.0
    data: bytearray = field(default_factory=bytearray)
    body_at: int = 0
    length: int | None = None  # of the body; None: in chunks

    def take(self, data: bytes) -> bool:
        """Add bytes; return whether the answer is complete."""
        self.data += data
        if not self.body_at:
            end = self.data.find(HEAD_END)
            if end < 0:
                return False
            self.body_at = end + len(HEAD_END)
            found = re.search(rb"(?i)\r\ncontent-length: *(\d+)", self.data[:end])
            self.length = int(found[1]) if found else None
        if self.first is None and FIRST_TEXT.search(self.data, self.body_at):
            self.first = time.monotonic()
        return self._complete()

    def _complete(self) -> bool:
        if self.length is not None:
            return len(self.data) >= self.body_at + self.length
        return self.data.endswith(LAST_CHUNK)

    def read(self) -> Answer:
        """Return the answer that the bytes hold."""
        head = bytes(self.data[: self.body_at]).decode("latin-1")
        lines = head.split("\r\n")
        status = int(lines[0].split(" ")[1]) if self.body_at else 0
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = bytes(self.data[self.body_at :]) if self.body_at else b""
        if self.length is None:
            body = _without_chunks(body)
        if headers.get("content-type", "").startswith("text/event-stream"):
            values, whole = _events(body), DONE in body
        else:
            values, whole = _json(body), bool(self.body_at) and self._complete()
        text, reason = _text(values)
        error = next((value["error"] for value in values if "error" in value), None)
        return Answer(
            row=self.row,
            status=status,
            sent=self.sent,
            first=self.first,
            ended=self.ended,
            text=text,
            whole=whole,
            finish_reason=reason,
            request_id=headers.get("x-request-id") or next((v["id"] for v in values if "id" in v), None),
            version=next((v["system_fingerprint"] for v in values if v.get("system_fingerprint")), None),
            retry_after=headers.get("retry-after"),
            error=error,
        )


def _without_chunks(body: bytes) -> bytes:
    """Return a body without its chunk framing; of a broken one, the part that arrived."""
    pieces, at = [], 0
    while (end := body.find(b"\r\n", at)) > 0:
        try:
            size = int(body[at:end].split(b";")[0], 16)
        except ValueError:
            break
        pieces.append(body[end + 2 : end + 2 + size])
        at = end + 2 + size + 2
    return b"".join(pieces)


def _events(body: bytes) -> list[dict[str, Any]]:
    lines = (
        line[6:] for line in body.split(b"\n") if line.startswith(b"data: ") and not line.startswith(DONE)
    )
    return [value for line in lines for value in _json(line)]


def _json(body: bytes) -> list[dict[str, Any]]:
    try:
        value = json.loads(body)
    except ValueError:  # cut off in the middle
        return []
    return [value] if isinstance(value, dict) else []


def _text(values: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """Return the text of all choices and why it ended."""
    text, reason = "", None
    for value in values:
        for choice in value.get("choices") or ():
            message = choice.get("delta") or choice.get("message") or {}
            text += message.get("content") or ""
            reason = choice.get("finish_reason") or reason
    return text, reason


class Connection(asyncio.Protocol):
    """A connection that carries one request at a time, and is reopened after an error."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._transport: asyncio.Transport | None = None
        self._reply: Reply | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def open(self) -> None:
        """Connect, unless it is connected.

        Raises:
            OSError: no server listens.
        """
        if self._transport is None or self._transport.is_closing():
            loop = asyncio.get_running_loop()
            self._transport, _ = await loop.create_connection(lambda: self, "127.0.0.1", self._port)

    async def ask(self, request: bytes, row: int, within_s: float = ANSWER_WITHIN_S) -> Reply:
        """Send a request and return its answer; the part that arrived if the connection broke."""
        used = self._transport is not None
        await self._send(reply := Reply(row, time.monotonic()), request, within_s)
        if used and not reply.data:
            # A server may close an idle connection at any time: HTTP clients ask once more on a new one.
            await self._send(reply, request, within_s)
        reply.ended = reply.ended or time.monotonic()
        return reply

    async def _send(self, reply: Reply, request: bytes, within_s: float) -> None:
        self._reply = reply
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self.open()
            assert self._transport is not None
            self._transport.write(request)
            async with asyncio.timeout(within_s):
                await self._waiter
        except (OSError, TimeoutError):
            self.close()
            await asyncio.sleep(0.01)  # a server that is gone is not asked in a busy loop
        self._reply = None

    def close(self) -> None:
        """Disconnect."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def data_received(self, data: bytes) -> None:
        """Store the bytes; wake the client at the end of the answer."""
        if self._reply is not None and self._reply.take(data):
            self._reply.ended = time.monotonic()
            if b"connection: close" in bytes(self._reply.data[: self._reply.body_at]).lower():
                self.close()
            self._done()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wake the client: the answer will not continue."""
        self._transport = None
        if self._reply is not None:
            self._done()

    def _done(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def chat_request(port: int, body: Mapping[str, Any]) -> bytes:
    """Return the bytes that ask for a chat completion."""
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


@dataclass(frozen=True, slots=True)
class Run(Generic[T]):
    """The answers of one turn.

    Attributes:
        started, stopped: when the first request went out, and when no more did; monotonic, s.
        cpu_s: CPU time of the client process during the turn.
    """

    clients: int
    started: float
    stopped: float
    cpu_s: float
    answers: list[T]


Ask = Callable[[int, int], Awaitable[T]]  # client, row → what came


async def closed_loop(
    ask: Ask[T],
    clients: int,
    rows: Iterator[int],
    seconds: float,
    at_least: int = 0,
    stop: asyncio.Event | None = None,
) -> Run[T]:
    """Let every client send one request after the other for a given time; then wait for open requests.

    Args:
        at_least: minimum number of requests, however long they take.
        stop: ends the turn early.
    """
    answers: list[T] = []
    asked = 0
    stopped: float | None = None
    started, cpu = time.monotonic(), time.process_time()

    async def client(number: int) -> None:
        nonlocal asked, stopped
        while True:
            late = time.monotonic() - started >= seconds and asked >= at_least
            if late or (stop is not None and stop.is_set()):
                stopped = stopped or time.monotonic()
                return
            asked += 1
            answers.append(await ask(number, next(rows)))

    await asyncio.gather(*(client(number) for number in range(clients)))
    return Run(clients, started, stopped or time.monotonic(), time.process_time() - cpu, answers)


class Clients:
    """Clients of one server, each with its own connection.

    Args:
        requests: the bytes to send, by row.
    """

    def __init__(self, port: int, requests: Sequence[bytes]) -> None:
        self._port, self._requests = port, requests
        self._connections: dict[int, Connection] = {}

    async def ask(self, client: int, row: int) -> Reply:
        """Ask one row as one client."""
        if client not in self._connections:
            self._connections[client] = Connection(self._port)
        return await self._connections[client].ask(self._requests[row % len(self._requests)], row)

    async def open(self, clients: int) -> None:
        """Connect all before they ask."""
        for client in range(clients):
            self._connections[client] = Connection(self._port)
            await self._connections[client].open()

    def close(self) -> None:
        """Disconnect all."""
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()


async def load(
    port: int,
    requests: Sequence[bytes],
    clients: int,
    rows: Iterator[int],
    seconds: float,
    at_least: int = 0,
    stop: asyncio.Event | None = None,
) -> Run[Answer]:
    """Put a closed loop of clients on a server and return their answers."""
    them = Clients(port, requests)
    try:
        run = await closed_loop(them.ask, clients, rows, seconds, at_least, stop)
    finally:
        them.close()
    answers = [reply.read() for reply in run.answers]
    return Run(run.clients, run.started, run.stopped, run.cpu_s, answers)


async def at_once(port: int, requests: Sequence[bytes]) -> list[Answer]:
    """Open a connection for each request, then send all requests at once."""
    them = Clients(port, requests)
    try:
        await them.open(len(requests))
        replies = await asyncio.gather(*(them.ask(number, number) for number in range(len(requests))))
    finally:
        them.close()
    return [reply.read() for reply in replies]


async def get(port: int, path: str, within_s: float = 5.0) -> tuple[int, bytes]:
    """Return status and body of a GET; status 0 without an answer."""
    writer = None
    try:
        async with asyncio.timeout(within_s):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(
                f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode()
            )
            found, _, body = (await reader.read(-1)).partition(HEAD_END)
    except (OSError, TimeoutError):
        return 0, b""
    finally:
        if writer is not None:
            with suppress(OSError):
                writer.close()
    if not found:
        return 0, b""
    if b"transfer-encoding: chunked" in found.lower():
        body = _without_chunks(body)
    return int(found.split(b" ")[1]), body
