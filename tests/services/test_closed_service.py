"""The real service as `make serve` starts it, asked by a page elsewhere, by proxies, with broken bodies."""

import signal
import time

import httpx
import psutil
import pytest

from services.keys.key_file import make_key, write_keys
from services.peers.own_user import PROBES
from stages.common import network
from tests.services.bento import serving_bento
from tests.services.users import OTHER_USER, needs_root, send_as

SECRET = "zoe@example.com 4111111111111111"
RATE = {"requests_per_minute: null": "requests_per_minute: 20"}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """Yield the service's address, its log and BentoML's parent process.

    Twenty requests a minute are allowed from one address.
    """
    with serving_bento(tmp_path_factory.mktemp("service"), RATE) as (process, url, log):
        yield url, log, process


@pytest.mark.slow
def test_every_route_refuses_other_hosts_other_origins_and_posts_without_preflight(service):
    url, *_ = service
    paths = httpx.get(f"{url}/docs.json").json()["paths"]
    routes = {(method.upper(), path) for path, ways in paths.items() for method in ways}
    assert {("POST", "/ask"), ("POST", "/v1/feedback"), ("GET", "/metrics"), ("GET", "/readyz")} <= routes
    routes |= {("GET", "/"), ("GET", "/page/page.js")}
    for method, path in sorted(routes):
        path = path.replace("{model}", "tiny")
        assert httpx.request(method, url + path, headers={"Host": "evil.example"}).status_code == 403, path
        origin = {"Origin": "https://evil.example"}
        answer = httpx.request(method, url + path, headers=origin, json={})
        assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers, path
        preflight = {**origin, "Access-Control-Request-Method": method}
        assert httpx.options(url + path, headers=preflight).status_code == 403, path
        if method == "POST":
            for kind in (
                "text/plain",
                "application/x-www-form-urlencoded",
                "multipart/form-data; boundary=x",
            ):
                answer = httpx.post(url + path, content=b"{}", headers={"Content-Type": kind})
                assert answer.status_code == 415, (path, kind)
    assert httpx.get(f"{url}/v1/models", headers={"Host": "own.example"}).status_code == 200


@pytest.mark.slow
@needs_root
def test_another_user_of_the_machine_gets_only_the_probes_until_there_is_a_key(tmp_path):
    with serving_bento(tmp_path) as (_, url, log):
        paths = httpx.get(f"{url}/docs.json").json()["paths"]
        routes = {(method.upper(), path) for path, ways in paths.items() for method in ways}
        closed = {(method, path) for method, path in routes if path not in PROBES} | {("GET", "/")}
        assert {("POST", "/ask"), ("POST", "/v1/feedback"), ("GET", "/v1/models")} <= closed
        json_type = {"Content-Type": "application/json"}
        requests = [(method, path, "{}", json_type) for method, path in sorted(closed)]
        for (method, path, *_), (status, text) in zip(
            requests, send_as(OTHER_USER, url, *requests), strict=True
        ):
            assert status == 403 and "perennial keys add NAME" in text, (method, path, text)
        for status, _ in send_as(OTHER_USER, url, *(("GET", path, None, {}) for path in PROBES)):
            assert status == 200
        assert f"a connection belongs to user {OTHER_USER}" in log.read_text()
        key, token = make_key("all", "2026-01-01T00:00:00Z")
        write_keys(tmp_path / ".perennial" / "api_keys.json", [key])
        until = time.monotonic() + 300
        while httpx.get(f"{url}/v1/models").status_code != 401:  # the own user needs it too from now on
            assert time.monotonic() < until
        named = ("GET", "/v1/models", None, {"Authorization": f"Bearer {token}"})
        (known, _), (unknown, _) = send_as(OTHER_USER, url, named, ("GET", "/v1/models", None, {}))
        assert (known, unknown) == (200, 401)


@pytest.mark.slow
def test_where_keys_are_always_needed_no_one_asks_without_and_the_log_names_no_own_user(service, tmp_path):
    assert "only processes of user" in service[1].read_text()
    with serving_bento(tmp_path, {"keys: auto #": "keys: always #"}) as (_, url, log):
        assert "only processes of user" not in log.read_text()
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/feedback", "/ask"):
            assert httpx.post(url + path, json={}).status_code == 401, path
        for path in ("/v1/models", "/v1/models/tiny"):
            assert httpx.get(url + path).status_code == 401, path


@pytest.mark.slow
def test_the_log_holds_nothing_that_was_asked_and_a_wrong_body_of_ask_is_told(service):
    url, log, _ = service
    for body in (
        f'{{"question": ["{SECRET}"]}}',
        f'{{"question": "{SECRET}',
        f'{{"question": "\\ud800{SECRET}"}}',
    ):
        answer = httpx.post(f"{url}/ask", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 422) and SECRET not in answer.text
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/feedback", f"/v1/{SECRET}", f"/{SECRET}"):
        httpx.post(url + path, json={"messages": SECRET, "prompt": [SECRET], "request_id": [SECRET]})
    assert httpx.post(f"{url}/ask", json={"question": SECRET, "max_tokens": 2}, timeout=60).status_code == 200
    text = log.read_text()
    assert "zoe@" not in text and "4111" not in text and "Traceback" not in text


@pytest.mark.slow
def test_no_header_of_a_client_chooses_its_address(service):
    """Runs last but one: it uses up the minute's requests."""
    url, *_ = service
    named = [{"X-Forwarded-For": f"10.1.{n}.1", "Forwarded": f"for=10.1.{n}.1"} for n in range(60)]
    with httpx.Client() as client:
        chat = [
            client.post(f"{url}/v1/chat/completions", json={"messages": 5}, headers=one).status_code
            for one in named
        ]
        asks = [client.post(f"{url}/ask", json={"question": 5}, headers=one).status_code for one in named]
    assert 429 in chat and 429 in asks


@pytest.mark.slow
def test_the_worker_ends_when_bentomls_parent_process_is_killed(service):
    """Runs last: it ends the service of the other tests."""
    url, _, process = service
    children = psutil.Process(process.pid).children(recursive=True)
    assert children and network.get(f"{url}/livez") is not None
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=120)
    assert alive == []
    assert network.get(f"{url}/livez") is None
