"""A body of /ask is checked after the key, and nothing of it is logged."""

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from services import errors
from services.api.ask import AskCheck
from services.keys.access import Caller

CALLER = Caller("key:ann", "ann", None, None)


@pytest.fixture
def asked():
    return []


@pytest.fixture
def client(asked):
    async def echo(request):
        return JSONResponse([(await request.body()).decode(), request.state.caller.key])

    async def get_caller(request):
        asked.append(request.headers.get("authorization"))
        if asked[-1] != "Bearer right":
            raise errors.invalid_api_key()
        return CALLER

    app = Starlette(routes=[Route("/ask", echo, methods=["POST"]), Route("/other", echo, methods=["POST"])])
    return TestClient(AskCheck(app, get_caller))


def ask(client, body, key="right"):
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    return client.post("/ask", content=body, headers=headers)


def test_a_valid_body_reaches_the_route_with_its_caller(client, asked):
    answer = ask(client, '{"question": "caf\\u00e9?", "max_tokens": 4, "user": null}')
    assert answer.json() == ['{"question":"café?","max_tokens":4}', "ann"]
    assert asked == ["Bearer right"]


def test_the_key_comes_before_the_body_and_a_wrong_body_counts_too(client, asked):
    assert ask(client, "no json", key="wrong").status_code == 401
    assert ask(client, "no json").status_code == 400
    assert len(asked) == 2


SECRET = "zoe@example.com"


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (f'{{"question": ["{SECRET}"]}}', 422, "question"),
        (f'{{"question": "my card 4111111111111111 {SECRET}', 400, None),
        (f'{{"question": "\\ud800 {SECRET}"}}', 400, None),
        (b'{"question": "\xff"}', 400, None),
        (f'"{SECRET}"'.encode("utf-16"), 400, None),
        (f'"{SECRET}"', 422, None),
        ("[" * 100_000, 400, None),
        ("", 400, None),
        (f'{{"question": "", "user": "{SECRET}"}}', 422, "question"),
        ('{"question": "hello", "max_tokens": 0}', 422, "max_tokens"),
        ('{"question": "hello", "max_tokens": 1e400}', 422, "max_tokens"),
        ('{"question": "hello", "max_tokens": NaN}', 422, "max_tokens"),
        ('{"question": "hello", "max_tokens": true}', 422, "max_tokens"),
        (f'{{"question": "hello", "user": "{"x" * 257}"}}', 422, "user"),
        ('{"question": "hello", "maxtokens": 3}', 422, "maxtokens"),
    ],
)
def test_a_wrong_body_is_named_and_not_repeated(client, caplog, body, status, field):
    answer = ask(client, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, field)
    assert SECRET not in answer.text and SECRET not in caplog.text and "4111" not in answer.text + caplog.text


def test_other_routes_are_left_alone(client, asked):
    with pytest.raises(AttributeError):  # no caller was put there
        client.post("/other", content="no json")
    assert asked == []
