"""What a page of another site or another user of the machine sends to a port of `make up` changes nothing."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time

import httpx
import pytest

from flows.common.page_secret import COOKIE, make_header
from stages.common import network
from tests.services.serving import ROOT
from tests.services.tiny_checkout import make_checkout
from tests.services.users import OTHER_USER, needs_root, send_as

PAGES = ("dashboard", "prefect", "mlflow", "evidently")
SAFE = {"get", "head", "options"}
OPEN = {"prefect": "/api/health", "mlflow": "/health", "evidently": "/api/version"}
EVIL = {"Origin": "https://evil.example"}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Yield the address of each page, the secret, and what was printed; all programs are up."""
    folder = tmp_path_factory.mktemp("up")
    ports = {name: network.free_port() for name in (*PAGES, "service")}
    keys = {"dashboard": 8000, "prefect": 4200, "mlflow": 5000, "evidently": 8001}
    changes = {f" {name}: {port} #": f" {name}: {ports[name]} #" for name, port in keys.items()}
    root = make_checkout(folder, {**changes, " port: 3000 #": f" port: {ports['service']} #"})
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "PERENNIAL_"))
    }
    paths = {"PREFECT_HOME": str(folder / "prefect"), "BENTOML_HOME": str(folder / "bentoml")}
    with (folder / "out").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.up"],
            cwd=root,
            env={**clean, **paths, "PYTHONPATH": str(ROOT)},
            stdout=out,
            stderr=out,
        )
    urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    try:
        wait_until_up(urls["dashboard"], process, folder / "out")
        secret = json.loads((root / ".perennial/server.json").read_text())["auth_string"].partition(":")[2]
        yield root, urls, secret, folder / "out"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(90)


def wait_until_up(dashboard, process, out):
    until = time.monotonic() + 300
    while True:
        answer = network.get(f"{dashboard}/api/status", 20)
        programs = json.loads(answer[1]).get("programs", []) if answer and answer[0] == 200 else []
        if len(programs) == 6 and all(one["state"] == "up" for one in programs):
            return
        assert process.poll() is None and time.monotonic() < until, (programs, out.read_text())
        time.sleep(0.5)


def wait_for_flows(dashboard):
    """Return the status once Prefect has answered the page; on a busy machine it can miss one refresh."""
    until = time.monotonic() + 300
    while True:
        status = httpx.get(f"{dashboard}/api/status", timeout=60).json()
        if status["flows"]["up"]:
            return status
        assert time.monotonic() < until, status["flows"]
        time.sleep(0.5)


def list_routes(name, url, auth):
    """Return method and path of all that the page's server can do, by its own description."""
    if name == "mlflow":
        from mlflow.server.handlers import get_endpoints

        return {(method.lower(), path) for path, _, methods in get_endpoints() for method in methods}
    place = "/schema/openapi.json" if name == "evidently" else "/openapi.json"
    paths = httpx.get(url + place, auth=auth, timeout=60).raise_for_status().json()["paths"]
    prefix = "/api" if name == "prefect" else ""
    routes = {
        (method, path if path.startswith("/api") else prefix + path)
        for path, ways in paths.items()
        for method in ways
    }
    return {(method, path) for method, path in routes if method in {*SAFE, "post", "put", "patch", "delete"}}


def fill(path):
    return re.sub(r"<[^>]*>|\{[^}]*\}", "00000000-0000-4000-8000-000000000000", path)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_every_route_refuses_what_a_page_elsewhere_can_send(pages, name):
    _, urls, secret, _ = pages
    auth = ("perennial", secret)
    routes = list_routes(name, urls[name], auth)
    changing = {(method, path) for method, path in routes if method not in SAFE}
    assert len(changing) > {"dashboard": -1, "prefect": 100, "mlflow": 50, "evidently": 5}[name]
    with httpx.Client(base_url=urls[name], auth=auth, timeout=60) as operator:
        # The browser sends the operator's cookie or password along: even so nothing is let through.
        for method, path in sorted({*changing, ("get", "/"), ("get", OPEN.get(name, "/healthz"))}):
            path = fill(path)
            answer = operator.request(method, path, headers=EVIL, json={})
            assert answer.status_code == 403, (method, path)
            assert "access-control-allow-origin" not in answer.headers
            assert operator.request(method, path, headers={"Host": "evil.example"}).status_code == 403
            preflight = {**EVIL, "Access-Control-Request-Method": method.upper()}
            assert operator.options(path, headers=preflight).status_code == 403
            for kind in ("text/plain", "application/x-www-form-urlencoded") if method == "post" else ():
                answer = operator.post(path, content=b"{}", headers={"Content-Type": kind})
                assert answer.status_code == 415, (path, kind)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prefect", "mlflow", "evidently"])
def test_another_user_of_the_machine_gets_nothing_but_the_probe(pages, name):
    root, urls, secret, _ = pages
    wrong = [{"auth": ("perennial", "guessed")}, {"auth": ("perennial", "")}]
    wrong.append({"headers": {"Cookie": f"{COOKIE}={secret}"}})  # the secret itself is no cookie
    with httpx.Client(base_url=urls[name], timeout=60) as other:
        for method, path in sorted(list_routes(name, urls[name], ("any", secret))):
            if path not in (OPEN[name], "/api/ready"):
                assert other.request(method, fill(path)).status_code == 401, (method, path)
        for given in wrong:
            assert other.get("/", **given).status_code == 401
    assert httpx.get(urls[name] + "/", timeout=60).status_code == 401
    assert httpx.get(urls[name] + OPEN[name], timeout=60).status_code == 200
    assert stat.S_IMODE((root / ".perennial/server.json").stat().st_mode) == 0o600


@pytest.mark.slow
@needs_root
def test_a_process_of_another_user_sees_the_dashboard_and_asks_the_service_only_with_a_secret(pages):
    _, urls, secret, _ = pages
    for name, paths in {"dashboard": ("/", "/api/status"), "service": ("/", "/v1/models")}.items():
        for status, text in send_as(OTHER_USER, urls[name], *(("GET", path, None, {}) for path in paths)):
            assert status == 403 and "wrong_user" in text, name
    word = {"Authorization": make_header(secret)}
    answers = send_as(
        OTHER_USER, urls["dashboard"], ("GET", "/healthz", None, {}), ("GET", "/api/status", None, word)
    )
    assert [status for status, _ in answers] == [200, 200]


@pytest.mark.slow
def test_the_printed_link_opens_every_page_to_the_operators_browser(pages):
    _, urls, secret, out = pages
    (link,) = re.findall(r"open (http\S+):", out.read_text())
    assert link.startswith(urls["dashboard"])
    with httpx.Client(follow_redirects=True, timeout=60) as browser:
        page = browser.get(link)
        assert page.status_code == 200 and secret not in str(page.url) and secret not in page.text
        (cookie,) = page.history[0].headers.get_list("set-cookie")
        assert "HttpOnly" in cookie and "SameSite=Lax" in cookie and secret not in cookie
        for name in ("prefect", "mlflow", "evidently"):
            # httpx keeps cookies by port, a browser by host.
            headers = {"Cookie": cookie.partition(";")[0], "Sec-Fetch-Site": "same-site"}
            assert f'href="{urls[name]}/"' in page.text
            answer = httpx.get(urls[name] + "/", headers=headers, follow_redirects=True, timeout=60)
            assert answer.status_code == 200 and "html" in answer.headers["content-type"], name
        own = {**headers, "Origin": urls["prefect"], "Sec-Fetch-Site": "same-origin"}
        flows = httpx.post(f"{urls['prefect']}/api/flows/filter", json={}, headers=own, timeout=60)
        assert flows.status_code == 200 and len(flows.json()) == 4  # registered by the executor
        settings = httpx.get(f"{urls['prefect']}/ui-settings", headers=own, timeout=60).json()
        assert settings["auth"] is None and settings["api_url"] == f"{urls['prefect']}/api"
    status = wait_for_flows(urls["dashboard"])
    assert secret not in json.dumps(status)


@pytest.mark.slow
def test_no_log_and_no_argument_of_a_process_holds_the_secret(pages):
    import psutil

    root, _, secret, _ = pages
    for path in [*(root / ".perennial/logs").iterdir(), root / ".perennial/up.json"]:
        assert secret not in path.read_text(), path
    for process in psutil.process_iter(["cmdline"]):
        assert not any(secret in word for word in process.info["cmdline"] or ()), process
