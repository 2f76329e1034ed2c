"""Where a process listens decides whether it asks for keys."""

import asyncio
import json
import socket
import subprocess
import sys

import pytest

from services.api.middleware import ConcurrencyLimit
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
