"""One request is one request: whatever it holds, it harms no other, and the engine goes on."""

import threading

import pytest

from services.engines.paged.model import PagedModel
from tests.services.serving import ask, load_paged, paged_files, serving


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return paged_files(tmp_path_factory.mktemp("one") / "model")


@pytest.fixture(scope="module")
def server(tmp_path_factory, files):
    with serving(tmp_path_factory.mktemp("service"), files, load=load_paged) as running:
        yield running


@pytest.fixture
def client(server):
    engine = server.handler.pool.champion.engine
    with server.client() as client:
        yield client
    assert server.handler.pool.champion.engine is engine and engine.broken is None, "the engine was restarted"


def ask_for(client, schema, **fields):
    """Ask for an answer under a schema."""
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return ask(client, response_format=wanted, **{"max_tokens": 8, **fields})


def test_a_grammar_that_outgrows_its_limits_is_a_fault_of_that_request(client):
    many = {f"k{n}": {"type": "string"} for n in range(501)}
    refused = ask_for(client, {"type": "object", "properties": many})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "response_format"), refused.text
    assert ask(client, max_tokens=2).status_code == 200


def test_while_an_engine_that_died_is_started_again_requests_get_503_and_when_to_come(
    tmp_path, files, monkeypatch
):
    step, reload = PagedModel.step, threading.Event()
    dying = threading.Event()

    def die(model, inputs):
        if dying.is_set():
            dying.clear()
            raise RuntimeError("out of memory")
        return step(model, inputs)

    def load(files, loaded=[]):  # noqa: B006 - it counts the calls
        loaded.append(files)
        assert len(loaded) == 1 or reload.wait(60)
        return load_paged(files)

    monkeypatch.setattr(PagedModel, "step", die)
    with serving(tmp_path, files, load=load) as server, server.client() as client:
        dying.set()
        for refused in (ask(client), ask(client)):  # the one that was running, and one that came later
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready"), refused.text
            assert int(refused.headers["Retry-After"]) >= 1
        reload.set()
        while (answer := ask(client, max_tokens=2)).status_code == 503:
            pass
        assert answer.status_code == 200
