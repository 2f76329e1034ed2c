"""Who knows the secret of the pages is let in, by password or by cookie, and no one else."""

import base64

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from flows.common.page_secret import COOKIE, PageSecret, make_header, make_link, make_secret

SECRET = "x" * 20 + "-_é"


def client(**options):
    def show(request):
        return PlainTextResponse(request.headers.get("authorization", "none"))

    app = Starlette(routes=[Route("/{path:path}", show, methods=["GET", "POST"])])
    return TestClient(PageSecret(app, SECRET, ("/health",), **options), follow_redirects=False)


def basic(text):
    return {"Authorization": "Basic " + base64.b64encode(text.encode()).decode()}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        basic("perennial:"),
        basic("perennial:wrong"),
        basic(SECRET),
        {"Authorization": "Basic !!!"},
        {"Authorization": "Basic /w=="},
        {"Authorization": f"Digest {SECRET}".encode()},
        {"Cookie": f"{COOKIE}="},
        {"Cookie": f"{COOKIE}={SECRET}".encode()},
        {"evidently-secret": ""},
    ],
)
def test_without_the_secret_the_answer_is_how_to_get_in(headers):
    answer = client().get("/runs", headers=headers)
    assert answer.status_code == 401 and "make up" in answer.text and SECRET not in answer.text
    assert answer.headers["www-authenticate"].startswith("Basic ")
    assert client().post("/health", headers=headers).status_code == 401


def test_the_probe_needs_no_secret():
    assert client().get("/health").status_code == 200


def test_a_program_sends_it_as_password_under_any_name_and_the_page_gets_one_form_of_it():
    for headers in (
        basic(f"perennial:{SECRET}"),
        basic(f"me:{SECRET}"),
        {"Authorization": make_header(SECRET)},
    ):
        assert client().get("/runs", headers=headers).text == make_header(SECRET)


def test_a_browser_brings_it_once_and_comes_back_with_a_cookie():
    browser = client()
    answer = browser.get(make_link("/a b/c", SECRET) + "&tab=1")
    assert (answer.status_code, answer.headers["location"]) == (303, "/a%20b/c?tab=1")
    assert {"HttpOnly", "SameSite=Lax", "Path=/"} <= {*answer.headers["set-cookie"].split("; ")}
    assert browser.get("/runs").text == make_header(SECRET)
    odd = {"Cookie": f'other={{"a": [1, 2]}}; {COOKIE}={browser.cookies[COOKIE]}; b'}
    assert client().get("/runs", headers=odd).status_code == 200


def test_a_wrong_secret_in_the_url_is_not_let_in_and_no_path_leads_elsewhere():
    assert client().get("/runs?secret=wrong").status_code == 401
    answer = client().get(f"http://testserver//evil.example/?secret={SECRET}")
    assert answer.headers["location"] == "/evil.example/"


def test_a_page_may_have_another_answer_for_who_brings_no_secret():
    page = client(otherwise=PlainTextResponse("no secret", 403))
    assert page.get("/").text == "no secret" == page.get("/", headers={"Cookie": f"{COOKIE}=x"}).text
    assert page.get("/", auth=("any", SECRET)).status_code == 200
    assert page.get(make_link("/", SECRET)).headers["set-cookie"].startswith(COOKIE)


def test_no_secret_is_made_twice():
    assert len({make_secret() for _ in range(100)}) == 100 and len(make_secret()) >= 32
