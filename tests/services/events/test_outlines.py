"""Of what is too long to be redacted in time, the length is stored, whichever field has it."""

import time

import pytest

from services.events import read_exchanges
from services.events.outlines import MAX_STORED_CHARS, limit_size, outline
from tests.services.serving import ask, serving, tiny_files

LARGE = 300_000  # characters; a body has a megabyte


@pytest.mark.parametrize("value", [None, [], "x" * MAX_STORED_CHARS, {"a": [1]}])
def test_what_is_not_too_long_stays(value):
    assert limit_size(value) is value


def test_an_outline_tells_equal_texts_apart_and_nothing_of_a_short_one():
    assert outline("x" * 5000) == outline("x" * 5000) != outline("y" * 5000)
    assert outline("+4930123456") == "[11 characters]"
    assert limit_size(["x" * LARGE, "ann"]) == [outline("x" * LARGE), "[3 characters]"]


def test_no_field_of_a_request_is_stored_beyond_a_bound(tmp_path):
    schema = {"enum": [{f"k{n}": "a1b2"} for n in range(LARGE // 20)]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    sent = {
        422: {"response_format": wanted},
        200: {"stop": ["a1b2 " * (LARGE // 20) for _ in range(4)]},
        400: {"messages": [{"role": "user", "content": "a1 " * (LARGE // 180)} for _ in range(60)]},
    }
    with serving(tmp_path, tiny_files(tmp_path / "model")) as server:
        with server.client() as client:
            answers = [ask(client, **{"max_tokens": 2, **fields}) for fields in sent.values()]
        server.run(server.handler.settle())
        url = server.handler.settings.events.url
        rows = [row for batch in read_exchanges(url, 0.0, time.time() + 60) for row in batch.to_pylist()]
    assert [answer.status_code for answer in answers] == [*sent]
    assert {row["status"] for row in rows} == {*sent}
    for row in rows:
        assert len(row["parameters"]) <= 2 * MAX_STORED_CHARS and len(row["messages"]) <= MAX_STORED_CHARS
    assert sum("characters, hashed" in row["parameters"] for row in rows) == 2
