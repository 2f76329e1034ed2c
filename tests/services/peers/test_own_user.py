"""Only the own user is answered: a real server, asked by this user and by another."""

import asyncio
import json
import threading
from contextlib import contextmanager

import httpx
import pytest
import uvicorn

from services.api.heads import make_protocol
from services.peers.own_user import OwnUser
from services.peers.owner import OwnerUnknown, find_slowly
from tests.services.users import OTHER_USER, needs_root, send_as

GET, POST, PROBE = ("GET", "/", None, {}), ("POST", "/v1/feedback", "{}", {}), ("GET", "/livez", None, {})


async def hello(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


@contextmanager
def serving(app, host="127.0.0.1", http=None):
    config = uvicorn.Config(
        app, host, 0, log_level="warning", lifespan="off", ws="none", http=http or make_protocol(60.0)
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
    finally:
        server.should_exit = True
        thread.join(60)


def never(peer, own):
    raise OwnerUnknown("no such table")


@needs_root
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("http", [None, "auto"])
@pytest.mark.parametrize("options", [{}, {"find_fast": never}])
def test_another_user_gets_the_probes_and_else_a_403_with_the_fix(host, http, options, caplog):
    with serving(OwnUser(hello, fix="perennial keys add NAME", **options), host, http) as url:
        assert [status for status, _ in send_as(0, url, GET, POST, PROBE)] == [200, 200, 200]
        answers = send_as(OTHER_USER, url, GET, POST, PROBE, GET)
        assert [status for status, _ in answers] == [403, 403, 200, 403]
        error = json.loads(answers[0][1])["error"]
        assert error["code"] == "wrong_user" and "perennial keys add NAME" in error["message"]
        assert error["type"] == "invalid_request_error" and error["param"] is None
    told = [record.getMessage() for record in caplog.records if str(OTHER_USER) in record.getMessage()]
    assert len(told) == 1, told


@needs_root
def test_where_keys_are_needed_every_user_is_passed_on_and_at_once():
    state = {"needed": True}
    with serving(OwnUser(hello, lambda: state["needed"])) as url:
        assert send_as(OTHER_USER, url, POST)[0][0] == 403
        state["needed"] = False
        assert send_as(OTHER_USER, url, POST)[0][0] == 200


def test_the_user_is_looked_up_once_a_connection():
    asked = []

    def count(peer, own):
        asked.append(peer)
        return find_slowly(peer, own)

    guard = OwnUser(hello, find_fast=never, find_slowly=count)
    with serving(guard) as url:
        with httpx.Client(base_url=url) as client:
            assert [client.get("/").status_code for _ in range(5)] == [200] * 5
        with httpx.Client(base_url=url) as client:
            assert client.get("/").status_code == 200
    assert len(asked) == len(set(asked)) == 2


def test_where_no_user_can_be_found_nobody_is_answered_and_the_log_has_the_reason(caplog):
    with serving(OwnUser(hello, find_fast=never, find_slowly=never)) as url:
        for _ in range(2):
            assert httpx.get(url).status_code == 403
        assert httpx.get(f"{url}/readyz").status_code == 200
    assert caplog.text.count("cannot be found (no such table)") == 1


def test_a_proxys_word_for_the_client_is_not_the_connection():
    """A server that believes proxies writes their client into the scope; the socket's addresses count."""
    seen = []

    def note(peer, own):
        seen.append(peer)
        return find_slowly(peer, own)

    app = uvicorn.middleware.proxy_headers.ProxyHeadersMiddleware(
        OwnUser(hello, find_fast=never, find_slowly=note), "127.0.0.1"
    )
    with serving(app) as url:
        assert httpx.get(url, headers={"X-Forwarded-For": "10.9.9.9"}).status_code == 200
    assert [peer[0] for peer in seen] == ["127.0.0.1"]


def test_a_connection_that_is_not_tcp_is_refused():
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(OwnUser(hello)({"type": "http", "path": "/", "client": None, "server": None}, None, send))
    assert sent[0]["status"] == 403


def test_only_so_many_connections_are_looked_up_at_a_time(monkeypatch):
    monkeypatch.setattr("services.peers.own_user.MAX_WAITING", 2)
    begun, go, sent = threading.Event(), threading.Event(), []

    def wait(peer, own):
        begun.set()
        go.wait(60)
        return 0

    async def send(message):
        sent.append(message.get("status"))

    async def rush():
        guard = OwnUser(hello, find_fast=never, find_slowly=wait)
        scopes = [
            {"type": "http", "path": "/", "client": ("127.0.0.1", port), "server": ("127.0.0.1", 1)}
            for port in (5, 6, 7)
        ]
        tasks = [asyncio.create_task(guard(scope, None, send)) for scope in scopes]
        await asyncio.to_thread(begun.wait, 60)
        await tasks[2]
        assert [status for status in sent if status] == [403]
        go.set()
        await asyncio.gather(*tasks)

    asyncio.run(rush())
    assert [status for status in sent if status] == [403, 200, 200]
