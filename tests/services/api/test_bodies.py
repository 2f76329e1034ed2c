"""Bodies that are slow, half, too large, or sent by someone without a key: real sockets."""

import asyncio
import json
import socket
import time
from contextlib import ExitStack

import pytest

from services.api import bodies
from services.api.bodies import BodyLimit
from services.errors import invalid_api_key
from services.events import read_exchanges
from tests.services.serving import ask, serving, tiny_files

LIMIT = 1_000_000  # of params.yaml


@pytest.fixture(scope="module")
def changes():
    return {"body_timeout_s": 3.0, "engine": {"max_running": 2, "max_waiting": 2}}


def connect(server):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def make_head(size, *more):
    lines = ("POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json", *more)
    return "\r\n".join((*lines, f"Content-Length: {size}", "", "")).encode()


def read_all(connection):
    """Read until the server closes; a reset raises."""
    pieces = []
    while piece := connection.recv(65_536):
        pieces.append(piece)
    head, _, body = b"".join(pieces).partition(b"\r\n\r\n")
    return int(head.split()[1]), head.lower(), json.loads(body)["error"]


def test_slow_bodies_take_no_place_from_others_and_end_with_408(server):
    with ExitStack() as stack, server.client() as client:
        slow = [stack.enter_context(connect(server)) for _ in range(96)]
        for connection in slow:
            connection.sendall(make_head(1000) + b"{")
        assert [ask(client, max_tokens=2).status_code for _ in range(5)] == [200] * 5
        for connection in slow:
            status, head, error = read_all(connection)
            assert (status, error["code"]) == (408, "body_timed_out")
            assert b"x-request-id" in head and b"connection: close" in head


def test_a_head_that_does_not_arrive_ends_its_connection(server):
    head = make_head(0)[:-2]  # but for the empty line that ends it
    with ExitStack() as stack, server.client() as client:
        silent, half, trickling = (stack.enter_context(connect(server)) for _ in range(3))
        second = stack.enter_context(connect(server))  # half a head after a whole request
        second.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n")
        while not second.recv(65_536).endswith(b"}"):
            pass
        half.sendall(head)
        second.sendall(head)
        trickling.sendall(b"G")
        trickling.settimeout(0.2)
        assert ask(client, max_tokens=2).status_code == 200
        while trickling.fileno() >= 0:
            try:
                if not trickling.recv(1):
                    break
            except TimeoutError:
                trickling.sendall(b"E")
            except ConnectionResetError:  # it wrote to a closed connection
                break
        assert [connection.recv(1) for connection in (silent, half, second)] == [b""] * 3
        assert ask(client, max_tokens=2).status_code == 200


def test_the_time_of_a_head_counts_anew_for_each_request_of_a_connection(server):
    """All together take longer than one may."""
    body = b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}'
    head = make_head(len(body))
    with connect(server) as connection:
        for _ in range(2):
            for piece in (head[:20], head[20:], body[:20]):
                connection.sendall(piece)
                time.sleep(0.6)
            connection.sendall(body[20:])
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200")


def test_a_head_that_is_too_large_ends_its_connection(server):
    with connect(server) as connection:
        sent = 0
        with pytest.raises(OSError):
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
            while sent < 64 * 2**20:
                connection.sendall(b"X-More: " + b"x" * 8000 + b"\r\n")
                sent += 8010
    assert sent < 64 * 2**20


def test_answers_that_are_not_read_keep_no_place(server):
    """Ten megabytes of log-probabilities do not fit into the buffers of a connection."""
    body = {"prompt": ["x" * 400] * 20, "max_tokens": 0, "echo": True, "logprobs": 20}
    content = json.dumps(body).encode()
    head = make_head(len(content)).replace(b"/v1/chat/completions", b"/v1/completions")
    with ExitStack() as stack, server.client() as client:
        for _ in range(4):  # as many as may be in progress
            connection = stack.enter_context(connect(server))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(head + content)
        for _ in range(200):
            if (status := ask(client, max_tokens=1).status_code) == 200:
                break
            time.sleep(0.2)
        assert status == 200


@pytest.mark.parametrize("size", [LIMIT + 1, 20_000_000])
def test_a_client_that_writes_before_it_reads_gets_the_413(server, size):
    with connect(server) as connection:
        connection.sendall(make_head(size) + b"x" * size)
        status, _, error = read_all(connection)
    assert (status, error["code"]) == (413, "request_too_large")
    assert str(LIMIT) in error["message"]


def test_a_body_of_unknown_size_gets_the_413_too(server):
    def endless():
        for _ in range(20):
            yield b"x" * 1_000_000

    with server.client() as client:
        answer = client.post("/v1/chat/completions", content=endless())
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_who_asks_first_is_told_before_anything_is_sent(server):
    with connect(server) as connection:
        connection.sendall(make_head(20_000_000, "Expect: 100-continue"))
        assert read_all(connection)[0] == 413
    with connect(server) as connection:
        connection.sendall(make_head(100, "Expect: 100-continue"))
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 Continue")


def test_half_a_body_is_no_request_even_if_what_came_is_json(server):
    def count():
        batches = read_exchanges(server.handler.settings.events.url, 0.0, time.time() + 60)
        return sum(batch.num_rows for batch in batches)

    before = count()
    whole = b'{"messages": [{"role": "user", "content": "x"}]}'
    with connect(server) as connection:
        connection.sendall(make_head(len(whole) + 1) + whole)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1000) == b"", "the server closes the connection"
    with server.client() as client:
        assert ask(client, max_tokens=1).status_code == 200
    assert count() == before + 1


def test_a_key_is_asked_for_before_the_body_and_the_401_can_be_read(tmp_path):
    with serving(tmp_path, tiny_files(tmp_path / "model"), keys_required=True) as server:
        with connect(server) as connection:
            connection.sendall(make_head(1000) + b"{")  # and no more
            connection.settimeout(5)
            head = connection.recv(65_536)
        assert head.startswith(b"HTTP/1.1 401") and b"x-request-id" in head
        with connect(server) as connection:
            connection.sendall(make_head(900_000) + b"x" * 900_000)
            assert read_all(connection)[0] == 401


def test_a_wrong_key_counts_once_against_the_rate(tmp_path):
    rate = {"requests_per_minute": 3}
    served = serving(tmp_path, tiny_files(tmp_path / "model"), keys_required=True, access=rate)
    with served as server, server.client(headers={"Authorization": "Bearer wrong"}) as client:
        assert [ask(client).status_code for _ in range(4)] == [401, 401, 401, 429]


def arrive(limit, *clients):
    """Send bodies, each a list of pieces, in turn, and return the statuses that the clients get."""

    async def send_all():
        turns = [asyncio.Queue() for _ in clients]
        statuses = [[] for _ in clients]

        async def one(number):
            async def send(message):
                if message["type"] == "http.response.start":
                    statuses[number].append(message["status"])

            scope = {"type": "http", "method": "POST", "headers": []}
            await limit(scope, turns[number].get, send)

        tasks = [asyncio.create_task(one(number)) for number in range(len(clients))]
        for turn in range(max(map(len, clients))):
            for number, pieces in enumerate(clients):
                if turn < len(pieces):
                    last = turn == len(pieces) - 1
                    turns[number].put_nowait(
                        {"type": "http.request", "body": pieces[turn], "more_body": not last}
                    )
            for _ in range(10):
                await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        return statuses

    return asyncio.run(send_all())


async def accept(scope, receive, send):
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})


def test_bodies_that_hold_too_much_memory_end_the_oldest_and_not_the_new(monkeypatch):
    monkeypatch.setattr(bodies, "MAX_HELD_BYTES", 300)
    limit = BodyLimit(accept, 150, 60.0, lambda scope: None)
    slow = [b"x" * 140, b"", b"", b"", b"", b"x"]
    statuses = arrive(limit, slow, slow, slow, [b"x", b"x"])
    assert statuses == [[408], [200], [200], [200]]


def test_what_is_held_is_given_back_whatever_the_end():
    def refuse(scope):
        raise invalid_api_key()

    limit = BodyLimit(accept, 100, 60.0, lambda scope: None)
    assert arrive(limit, [b"x" * 60, b"x" * 60, b""], [b"x", b"y"]) == [[413], [200]]
    assert (limit._held, limit._arriving) == (0, {})
    assert arrive(BodyLimit(accept, 100, 60.0, refuse), [b"x", b"y"]) == [[401]]
