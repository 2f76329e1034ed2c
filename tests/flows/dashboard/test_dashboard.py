import http.server
import json
import os
import shutil
import socket
import threading
import time
from dataclasses import replace
from urllib.parse import urlsplit

import pytest
from starlette.testclient import TestClient

from flows.common.up_state import UP_STATE, ProgramState, UpState, write_up_state
from flows.dashboard.app import format_duration, format_number, make_app
from flows.dashboard.status import MAX_BINS, StatusCache, cut_bins, read_status
from services.events import count_traffic, read_time_span
from services.versions.aliases import ALIASES, read_aliases, write_aliases
from stages.common.artifacts import write_json
from stages.common.params.loading import load_params
from tests.flows import loop_traces
from tests.flows.loop_traces import (
    CHAMPION,
    FORMER,
    ROOT,
    exchange,
    leave_traces,
    record,
    thumb,
    verdict,
)


@pytest.fixture(autouse=True)
def unhurried(monkeypatch):
    """Count all bins in one refresh, however slow the machine is."""
    monkeypatch.setattr("flows.dashboard.status.COUNT_WITHIN_S", 600.0)


@pytest.fixture
def params(monkeypatch):
    """The shipped parameters, with addresses where nothing listens."""
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
    params = load_params(ROOT / "params.yaml")
    pages = params.flows.pages.model_copy(update=dict.fromkeys(("prefect", "mlflow", "evidently"), free))
    flows = params.flows.model_copy(update={"pages": pages})
    services = params.services.model_copy(update={"port": free})
    return params.model_copy(update={"flows": flows, "services": services})


@pytest.fixture
def checkout(tmp_path):
    """A checkout in which nothing has happened; its pages are at addresses where nothing listens."""
    text = (ROOT / "params.yaml").read_text()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
    for key in ("prefect: 4200", "mlflow: 5000", "evidently: 8001", "port: 3000"):
        text = text.replace(f" {key} ", f" {key.split(':')[0]}: {free} ")
    (tmp_path / "params.yaml").write_text(text)
    return tmp_path


def test_a_fresh_checkout_has_nothing_and_no_problems(tmp_path, params):
    status = read_status(tmp_path, params, StatusCache())
    assert status["problems"] == []
    assert status["model"]["champion"] is None and status["verdict"] is None and status["traffic"] is None
    assert status["gates"] == [] and status["releases"] == [] and status["feedback"] is None
    assert not status["flows"]["up"]
    assert {program["name"]: program["state"] for program in status["programs"]} == dict.fromkeys(
        ("service", "prefect", "mlflow", "evidently"), "down"
    )


def test_what_the_loop_left_is_seen(tmp_path, params):
    now = time.time()
    leave_traces(tmp_path, now)
    status = read_status(tmp_path, params, StatusCache(), now)
    assert status["problems"] == []
    model = status["model"]
    assert (model["champion"], model["former"], model["pinned"]) == (CHAMPION, FORMER, None)
    assert model["since"] == pytest.approx(now - (26 - 18.8) * 3600)
    assert [one["drifted"] for one in status["verdicts"]] == [False] * 6 + [True] * 3 + [False] * 3
    assert [one["passed"] for one in status["gates"]] == [True, False]
    assert [[trial["state"] for trial in gate["trials"]] for gate in status["gates"]] == [["good"], []]
    assert status["releases"][0]["action"] == "promote"
    traffic = status["traffic"]
    assert traffic["complete"] and sum(one["requests"] for one in traffic["bins"]) == 400
    json.dumps(status, allow_nan=False)


def test_the_pin_of_the_alias_file_is_shown(tmp_path, params):
    leave_traces(tmp_path, time.time(), traffic=False)
    aliases = replace(read_aliases(tmp_path / ALIASES), pinned="before the holidays")
    write_aliases(tmp_path / ALIASES, aliases)
    assert read_status(tmp_path, params, StatusCache())["model"]["pinned"] == "before the holidays"


def test_before_the_first_release_the_pipelines_model_is_shown_as_served(tmp_path, params):
    write_json(tmp_path / "artifacts/export/serving.json", {"name": "m", "version": "1"})
    model = read_status(tmp_path, params, StatusCache())["model"]
    assert (model["champion"], model["released"]) == ("m:1", False)
    assert model["since"] is not None


def test_broken_files_are_told_and_hide_nothing_else(tmp_path, params):
    now = time.time()
    leave_traces(tmp_path, now, traffic=False)
    (tmp_path / "reports/gate/4b5c6d7e8f90.json").write_text('{"tag": ')
    newest = sorted((tmp_path / "reports/watch").iterdir())[-1]
    (newest / "verdict.json").write_text("[]")
    with (tmp_path / ".perennial/releases.jsonl").open("a") as file:
        file.write('{"at": 1}\n')
    status = read_status(tmp_path, params, StatusCache(), now)
    assert len(status["problems"]) == 3
    assert "releases.jsonl, line 4 is not a valid release" in "".join(status["problems"])
    assert "4b5c6d7e8f90.json is not JSON" in "".join(status["problems"])
    assert len(status["gates"]) == 1 and len(status["verdicts"]) == 11 and status["releases"] == []


def test_a_file_that_is_no_store_is_told(tmp_path, params):
    (tmp_path / ".perennial").mkdir()
    (tmp_path / ".perennial/events.db").write_text("no database")
    status = read_status(tmp_path, params, StatusCache())
    assert status["traffic"] is None
    assert status["problems"] and status["problems"][0].startswith("the event store: ")


def test_late_feedback_and_new_answers_change_only_the_latest_bins(tmp_path, params):
    cache = StatusCache()
    began = 1_790_000_000.0
    record(tmp_path, [exchange(number, began + 60 * number) for number in range(30)])
    first = read_status(tmp_path, params, cache)["traffic"]
    record(tmp_path, [exchange(100, began + 1735, valid=False), thumb(100, began + 1736, False)])
    second = read_status(tmp_path, params, cache)["traffic"]
    assert sum(one["requests"] for one in first["bins"]) == 30
    assert sum(one["requests"] for one in second["bins"]) == 31
    assert sum(one["thumbs_down"] for one in second["bins"]) == 1
    assert first["bins"][:-3] == second["bins"][:-3] and first["bins"][-3:] != second["bins"][-3:]


def test_traffic_is_counted_by_what_became_of_it(tmp_path):
    record(
        tmp_path,
        [
            exchange(1, 10.0),
            exchange(2, 11.0, status=500, valid=None),
            exchange(3, 12.0, status=429, valid=None),
            exchange(4, 13.0, valid=False, version="other"),
            exchange(5, 14.0, role="shadow"),
            exchange(6, 20.0),
            thumb(1, 15.0, True),
            thumb(4, 16.0, False),
        ],
    )
    url = f"sqlite:///{tmp_path / '.perennial' / 'events.db'}"
    one, other = count_traffic(url, [(10.0, 20.0), (20.0, 30.0)])
    assert (one.requests, one.refused, one.failed, one.checked, one.valid) == (4, 1, 1, 2, 1)
    assert (one.thumbs_up, one.thumbs_down, one.corrections) == (1, 1, 0)
    assert one.versions == {"4b5c6d7e8f90": 3, "other": 1}
    assert (other.requests, other.thumbs_up) == (1, 0)
    assert read_time_span(url) == (10.0, 20.0)


@pytest.mark.parametrize("span_s", [0.0, 5.0, 700.0, 26 * 3600.0, 40 * 86_400.0])
def test_bins_hold_the_last_traffic_and_are_not_too_many(span_s):
    last = 1_790_000_123.4
    edges, step = cut_bins(last - span_s, last)
    assert edges[-2] <= last < edges[-1] and len(edges) - 1 <= MAX_BINS
    assert edges[0] <= max(last - span_s, last - 7 * 86_400)
    assert all(edge % step == 0 for edge in edges)


def test_the_supervisors_word_is_taken_only_while_it_lives(tmp_path, params):
    service = ProgramState("up", 1.0, 0, "", "http://127.0.0.1:1/", "log", None)
    path = tmp_path / UP_STATE
    write_up_state(path, UpState(os.getpid(), 1.0, {"service": service}))
    states = {one["name"]: one["state"] for one in read_status(tmp_path, params, StatusCache())["programs"]}
    assert states["service"] == "up"
    write_up_state(path, UpState(2**22 + 1, 1.0, {"service": service}))  # no process has such an id
    states = {one["name"]: one["state"] for one in read_status(tmp_path, params, StatusCache())["programs"]}
    assert states["service"] == "down"


class Prefect(http.server.BaseHTTPRequestHandler):
    """Prefect's API as far as the page asks it."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/api/flows/filter":
            answer = [{"id": "1", "name": "watch"}, {"id": "2", "name": "somebody-elses"}]
        else:
            assert body["flows"]["id"]["any_"] == ["1"]
            state = {"type": "FAILED", "message": "the store is away"}
            run = {"id": "9", "name": "lucky", "state": state, "start_time": "2026-11-21T10:00:00Z"}
            answer = [run | {"total_run_time": 4.2}]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        pass


def test_the_last_run_of_each_of_our_flows_is_asked_of_prefect(tmp_path, params):
    with http.server.HTTPServer(("127.0.0.1", 0), Prefect) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        write_json(tmp_path / ".perennial/server.json", {"url": f"{base}/api"})
        flows = read_status(tmp_path, params, StatusCache())["flows"]
        server.shutdown()
    assert flows["up"] and set(flows["runs"]) == {"watch"}
    run = flows["runs"]["watch"]
    assert (run["state"], run["started"]) == ("FAILED", 1795255200.0)
    assert run["page"] == f"{base}/runs/flow-run/9"


def test_the_page_of_a_fresh_checkout_says_what_to_do(checkout):
    with TestClient(make_app(checkout)) as client:
        answer = client.get("/")
        assert client.get("/api/status").json()["model"]["champion"] is None
    assert answer.status_code == 200 and "default-src 'none'" in answer.headers["Content-Security-Policy"]
    for words in ("make run", "make up", "perennial watch", "perennial release"):
        assert words in answer.text


def test_the_page_shows_what_the_loop_left_and_escapes_it(checkout):
    leave_traces(checkout, time.time())
    hostile = verdict(time.time() - 60, drifted=True)
    changes = [loop_traces.change("language", "category", drifted=True, summary="<script>alert(1)</script>")]
    loop_traces.write_verdict(checkout, verdict(hostile.window.end, drifted=True, columns={"input": changes}))
    with TestClient(make_app(checkout)) as client:
        text = client.get("/").text
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text
    for words in ("4b5c6d7e8f90", "rejected", "31 points better", "No sign of harm", "canary, 20 % of users"):
        assert words in text
    assert text.count('class="change"') >= 3 and text.count('class="drift"') == 4


def test_reports_are_served_and_nothing_else_is(checkout):
    (checkout / "secret").write_text("secret")
    window = checkout / "reports/watch/20261121T101500-500"
    window.mkdir(parents=True)
    (window / "report.html").write_text("<p>Evidently</p>")
    with TestClient(make_app(checkout)) as client:
        report = client.get("/reports/watch/20261121T101500-500")
        assert (
            report.text == "<p>Evidently</p>"
            and "default-src 'none'" in report.headers["Content-Security-Policy"]
        )
        for path in ("..", "%2e%2e%2f%2e%2e%2fsecret", "*", "20261121T101500-50?"):
            assert client.get(f"/reports/watch/{path}").status_code == 404
        assert client.get("/page/dashboard.html").status_code == 404
        assert client.post("/", json={}).status_code == 405


def test_wrong_parameters_are_shown_and_not_a_blank_page(checkout):
    (checkout / "params.yaml").write_text("collect: 1\n")
    with TestClient(make_app(checkout)) as client:
        text, status = client.get("/").text, client.get("/api/status")
    assert "collect" in text and status.status_code == 503 and "collect" in status.json()["problem"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.6, "1 min"), (3723, "1 h 2 min"), (3605, "1 h"), (200_000, "2 d 7 h")],
)
def test_lengths_of_time_are_shown_with_their_largest_units(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.0005, "0.0005"), (-0.25, "−0.25"), (0.0, "0"), (214.0, "214")]
)
def test_numbers_are_shown_without_idle_digits(value, text):
    assert format_number(value) == text


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def served(checkout):
    """The dashboard served for real; yields its address."""
    import uvicorn

    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(make_app(checkout, every_s=0.2), log_level="warning")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        server.should_exit = True
        thread.join(60)


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if BROWSER is None:
        pytest.skip("no Chromium found: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=BROWSER,
            args=["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"],
        )
        yield browser
        browser.close()


@pytest.mark.slow
def test_the_page_is_accessible_fits_a_phone_and_loads_nothing_from_elsewhere(checkout, served, browser):
    axe_playwright = pytest.importorskip("axe_playwright_python.sync_playwright")
    for filled in (False, True):
        if filled:
            leave_traces(checkout, time.time())
            time.sleep(1.5)  # the page looks every 0.2 s, and the watcher reads 12 verdicts
        for scheme, width in (("light", 1280), ("dark", 380), *([("light", 800)] if filled else [])):
            page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
            complaints, hosts = [], set()
            page.on("console", lambda message: complaints.append(message.text))  # noqa: B023
            page.on("pageerror", lambda error: complaints.append(str(error)))  # noqa: B023
            page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))  # noqa: B023
            page.goto(served)
            page.get_by_role("heading", name="At a glance").wait_for()
            assert page.get_by_role("img").count() == (3 if filled else 0)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert axe_playwright.Axe().run(page).response["violations"] == []
            assert complaints == [] and hosts == {"127.0.0.1"}
            page.close()


@pytest.mark.slow
def test_the_page_stays_fresh_and_what_was_opened_stays_open(checkout, served, browser):
    leave_traces(checkout, time.time())
    page = browser.new_page()
    page.goto(served)
    refused = page.locator("#gate-bad000bad000")
    refused.locator("summary").click()
    page.get_by_role("heading", name="At a glance").click()
    page.evaluate("document.activeElement.blur()")
    aliases = json.loads((checkout / ".perennial/aliases.json").read_text())
    write_json(checkout / ".perennial/aliases.json", aliases | {"challenger": None})
    page.get_by_label("Champion").get_by_text("none", exact=True).wait_for(timeout=60_000)
    assert refused.evaluate("one => one.open")


@pytest.mark.slow
def test_a_link_that_has_the_focus_is_not_taken_away(checkout, served, browser):
    page = browser.new_page()
    page.goto(served)
    link = page.get_by_role("link", name="Service")
    link.focus()
    leave_traces(checkout, time.time())
    page.get_by_text("31 points better").wait_for(timeout=60_000)
    assert link.evaluate("one => one === document.activeElement")
