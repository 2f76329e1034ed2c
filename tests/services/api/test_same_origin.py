"""What a page of another site can make a browser send is not answered."""

import asyncio

import pytest

from services.api.same_origin import SameOrigin

OWN = "127.0.0.1:3000"


def ask(headers, method="GET", kind="http", **options):
    """Return the status that a request gets; 200 if it reached the application."""
    sent, reached = [], []

    async def app(scope, receive, send):
        reached.append(scope)

    async def send(message):
        sent.append(message)

    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    scope = {"type": kind, "path": "/", "method": method, "headers": raw}
    asyncio.run(SameOrigin(app, **options)(scope, None, send))
    if kind == "websocket":
        return 200 if reached else sent[0]["code"]
    return 200 if reached else sent[0]["status"]


@pytest.mark.parametrize("host", ["127.0.0.1", OWN, "localhost:3000", "LOCALHOST", "[::1]:3000"])
def test_this_machines_own_names_are_answered(host):
    assert ask([("host", host)]) == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:3000", "127.0.0.1.evil.example", "localhost.evil.example"),
        *("evil@127.0.0.1", "127.0.0.1:3000@evil.example", "10.0.0.7", "0.0.0.0", "", "[::1", "127.0.0.1:x"),
        *("127.0.0.1/evil", "2130706433", "127.0.0.1, evil.example", "localhost\u00e9"),
    ],
)
def test_any_other_host_is_refused(host):
    assert ask([("host", host)]) == 403
    assert ask([("host", host)], kind="websocket") == 1008


def test_two_hosts_are_refused_and_a_probe_without_one_is_answered():
    assert ask([("host", OWN), ("host", "evil.example")]) == 403
    assert ask([("host", OWN), ("host", OWN)]) == 403
    assert ask([]) == 200


def test_a_configured_name_is_answered_with_its_port_only():
    hosts = ["llm.example.org", "prefect:4200"]
    assert ask([("host", "llm.example.org:8080")], hosts=hosts) == 200
    assert ask([("host", "prefect:4200")], hosts=hosts) == 200
    assert ask([("host", "prefect:4201")], hosts=hosts) == 403
    assert ask([("host", "other.example.org")], hosts=hosts) == 403


def test_a_server_that_others_can_reach_is_called_by_its_addresses_but_by_no_name_of_others():
    public = {"is_public": lambda: True}
    assert ask([("host", "10.0.0.7:3000")], **public) == 200
    assert ask([("host", "[2001:db8::7]:3000")], **public) == 200
    assert ask([("host", "evil.example")], **public) == 403


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "http://127.0.0.1:9999",
        "http://localhost:3000",
        "file://",
        "",
        "http://[",
    ],
)
def test_another_origin_is_refused_whatever_it_asks(origin, method):
    assert ask([("host", OWN), ("origin", origin)], method) == 403
    assert ask([("host", OWN), ("origin", origin)], kind="websocket") == 1008


def test_the_pages_own_requests_are_answered():
    own = [("host", OWN), ("origin", f"http://{OWN}"), ("content-type", "application/json")]
    assert ask([*own, ("content-length", "2"), ("sec-fetch-site", "same-origin")], "POST") == 200
    # TLS ends at a proxy: the scheme differs, and the proxy hands the name on.
    behind = [("host", "llm.example.org"), ("origin", "https://llm.example.org")]
    assert ask(behind, "GET", hosts=["llm.example.org"]) == 200
    # The proxy calls the service by another name.
    behind = [("host", OWN), ("origin", "https://llm.example.org")]
    assert ask(behind, "GET", hosts=["llm.example.org"]) == 200


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "Text/Plain; charset=utf-8",
        "application/x-www-form-urlencoded",
        "multipart/form-data; a=b",
    ],
)
@pytest.mark.parametrize("size", [("content-length", "5"), ("transfer-encoding", "chunked")])
def test_a_post_that_needs_no_preflight_is_refused(kind, size):
    assert ask([("host", OWN), ("content-type", kind), size], "POST") == 415


def test_a_body_without_a_type_is_refused_and_a_post_without_a_body_is_not():
    assert ask([("host", OWN), ("content-length", "5")], "POST") == 415
    assert ask([("host", OWN), ("content-length", "0")], "POST") == 200
    assert ask([("host", OWN)], "POST") == 200
    assert ask([("host", OWN), ("content-type", "text/plain"), ("content-length", "5")], "PUT") == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_browsers_own_word_counts_where_no_origin_is_sent(site):
    assert ask([("host", OWN), ("sec-fetch-site", site)], "POST") == 403
    assert ask([("host", OWN), ("sec-fetch-site", site)], "GET") == 200  # a link to this page
