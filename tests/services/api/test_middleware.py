"""Where a process listens decides whether it asks for keys."""

import asyncio
import json
import socket
import subprocess
import sys

import pytest

from services.api.middleware import ConcurrencyLimit, Deadline
from tests.services.serving import ROOT

LISTEN = """
import socket
from services.api.middleware import listens_beyond_loopback
with socket.create_server(("{address}", 0)):
    print(listens_beyond_loopback())
"""


@pytest.mark.parametrize(("address", "beyond"), [("127.0.0.1", "False"), ("0.0.0.0", "True")])
def test_a_socket_on_every_address_is_beyond_loopback(address, beyond):
    done = subprocess.run(
        [sys.executable, "-c", LISTEN.format(address=address)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == beyond, done.stderr


def test_a_socket_handed_down_by_a_parent_is_seen(tmp_path):
    """BentoML's parent process opens the socket, and the worker serves it."""
    code = "from services.api.middleware import listens_beyond_loopback; print(listens_beyond_loopback())"
    with socket.create_server(("0.0.0.0", 0)) as listening:
        listening.set_inheritable(True)
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            capture_output=True,
            text=True,
            pass_fds=[listening.fileno()],
        )
    assert done.stdout.strip() == "True", done.stderr


def test_a_process_that_listens_nowhere_is_not_beyond():
    code = "from services.api.middleware import listens_beyond_loopback; print(listens_beyond_loopback())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_a_crowd_is_turned_away_with_openais_error_before_anything_is_read():
    inside, answered = asyncio.Event(), []

    async def app(scope, receive, send):
        await inside.wait()
        answered.append(scope["path"])

    async def ask(crowd, path):
        sent = []

        async def receive():
            raise AssertionError("nothing may be read")

        async def send(message):
            sent.append(message)

        await crowd({"type": "http", "path": path}, receive, send)
        return sent

    async def rush():
        crowd = ConcurrencyLimit(app, ["/v1/completions"], limit=2)
        welcome = [asyncio.create_task(ask(crowd, "/v1/completions")) for _ in range(2)]
        await asyncio.sleep(0)
        start, body = await ask(crowd, "/v1/completions")
        elsewhere = asyncio.create_task(ask(crowd, "/readyz"))
        inside.set()
        await asyncio.gather(*welcome, elsewhere)
        assert await ask(crowd, "/v1/completions") == [], "there is room again"
        return start, body

    start, body = asyncio.run(rush())
    assert start["status"] == 429 and dict(start["headers"])[b"retry-after"] == b"1"
    assert json.loads(body["body"])["error"]["code"] == "overloaded"
    assert sorted(answered) == ["/readyz"] + ["/v1/completions"] * 3


def send_through(middleware):
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(middleware({"type": "http", "path": "/v1/completions"}, None, send))
    return sent


def test_a_request_that_takes_too_long_ends_with_504_in_openais_shape():
    async def never(scope, receive, send):
        await asyncio.Event().wait()

    start, body = send_through(Deadline(never, 0.01, 60.0))
    error = json.loads(body["body"])["error"]
    assert (start["status"], error["code"], error["type"]) == (504, "timed_out", "server_error")


def test_an_answer_that_has_begun_may_take_longer_than_the_deadline():
    async def slow(scope, receive, send):
        await send({"type": "http.response.start"})
        await asyncio.sleep(0.1)
        await send({"type": "http.response.body"})

    assert len(send_through(Deadline(slow, 0.05, 60.0))) == 2


def test_a_timeout_of_the_request_itself_is_not_the_deadline():
    async def fail(scope, receive, send):
        raise TimeoutError("the store")

    with pytest.raises(TimeoutError, match="the store"):
        send_through(Deadline(fail, 60.0, 60.0))


def test_a_response_that_the_client_does_not_read_ends_the_request():
    ended = []

    async def answer(scope, receive, send):
        try:
            await send({"type": "http.response.start"})
            await send({"type": "http.response.body"})
        finally:
            ended.append(True)

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    asyncio.run(Deadline(answer, 60.0, 0.01)({"type": "http", "path": "/v1/completions"}, None, send))
    assert ended == [True]
