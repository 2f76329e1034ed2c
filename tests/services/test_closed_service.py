"""The real service as `make serve` starts it, asked by a page elsewhere, by proxies, with broken bodies."""

import signal

import httpx
import psutil
import pytest

from stages.common import network
from tests.services.bento import serving_bento

SECRET = "zoe@example.com 4111111111111111"
RATE = {"requests_per_minute: null": "requests_per_minute: 20"}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """Yield the service's address and its log; twenty requests a minute are allowed from one address."""
    with serving_bento(tmp_path_factory.mktemp("service"), RATE) as (_, url, log):
        yield url, log


@pytest.mark.slow
def test_the_worker_ends_when_bentomls_parent_process_is_killed(tmp_path):
    with serving_bento(tmp_path) as (process, url, _):
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.send_signal(signal.SIGKILL)
        process.wait()
        _, alive = psutil.wait_procs(children, timeout=120)
        assert alive == []
        assert network.get(f"{url}/livez") is None


@pytest.mark.slow
def test_every_route_refuses_other_hosts_other_origins_and_posts_without_preflight(service):
    url, _ = service
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
def test_another_user_of_the_machine_can_ask_until_keys_are_required_and_the_log_tells_it(service, tmp_path):
    assert "every user of this machine can ask and give feedback" in service[1].read_text()
    with serving_bento(tmp_path, {"keys: auto #": "keys: always #"}) as (_, url, log):
        assert "every user of this machine" not in log.read_text()
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/feedback", "/ask"):
            assert httpx.post(url + path, json={}).status_code == 401, path
        for path in ("/v1/models", "/v1/models/tiny"):
            assert httpx.get(url + path).status_code == 401, path


@pytest.mark.slow
def test_the_log_holds_nothing_that_was_asked_and_a_wrong_body_of_ask_is_told(service):
    url, log = service
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
    """Runs last: it uses up the minute's requests."""
    url, _ = service
    named = [{"X-Forwarded-For": f"10.1.{n}.1", "Forwarded": f"for=10.1.{n}.1"} for n in range(60)]
    with httpx.Client() as client:
        chat = [
            client.post(f"{url}/v1/chat/completions", json={"messages": 5}, headers=one).status_code
            for one in named
        ]
        asks = [client.post(f"{url}/ask", json={"question": 5}, headers=one).status_code for one in named]
    assert 429 in chat and 429 in asks
