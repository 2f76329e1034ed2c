"""Conversations of real clients with the real service: calls that run, whole and streamed."""

from importlib.util import find_spec

import pytest

from benchmarks.tool_clients import CLIENTS, TURNS, Conversation, Server, find_server, run_client
from stages.common.errors import InputError
from tests.services.serving import load_paged, serving
from tests.services.tool_models import tool_files
from tests.stages.common.chat.tool_templates import MISTRAL

COUNT = 3
NOWHERE = "http://127.0.0.1:9/v1"
MODULES = {"openai": "openai", "pydantic-ai": "pydantic_ai", "litellm": "litellm"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clients")
    changes = {
        "answers": {"default_max_tokens": 900, "max_tokens": 2000},
        "guard": {"max_prompt_tokens": 30_000},
    }
    files = tool_files(folder / "model", MISTRAL, max_position_embeddings=32_768)
    with serving(folder, files, load=load_paged, **changes) as running:
        yield find_server(f"{running.url}/v1")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_finishes_its_conversations_with_random_weights(server, client):
    if find_spec(MODULES[client]) is None:
        pytest.skip(f"{client} is not installed")
    found = run_client(client, server, COUNT, "required")
    assert found["failures"] == {}
    assert (found["finished"], found["streamed"], found["turns"]) == (COUNT, 1, TURNS * COUNT)
    assert found["calls"] > found["rounds"] == TURNS * COUNT  # some calls are parallel
    assert found["parallel"] > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("client", CLIENTS)
def test_a_model_that_answers_without_a_call_finishes_nothing(server, client):
    if find_spec(MODULES[client]) is None:
        pytest.skip(f"{client} is not installed")
    found = run_client(client, server, 2, "auto")  # random weights begin no call by themselves
    assert (found["finished"], found["turns"], found["calls"]) == (0, 0, 0)
    assert found["failures"] == {"ValueError: no call, though the question needs one": 2}


@pytest.mark.slow
def test_a_service_that_cannot_be_reached_is_a_counted_failure():
    found = run_client("openai", Server(NOWHERE, "tiny"), 2, "required")
    assert found["finished"] == 0 and found["failures"] == {"APIConnectionError: Connection error.": 2}
    with pytest.raises(InputError, match="does not answer"):
        find_server(NOWHERE)


def test_a_call_that_does_not_fit_does_not_run():
    conversation = Conversation(0, "required")
    assert conversation.run("timer", '{"action":"start","minutes":5}') == '{"ok": true}'
    for name, arguments in (
        ("media", '{"action":"play"}'),  # is not asked about
        ("timer", "{"),
        ("timer", '{"minutes":5}'),
        ("timer", '{"action":"start","minutes":100}'),
    ):
        with pytest.raises(ValueError):
            conversation.run(name, arguments)
    assert conversation.found["calls"] == 1
    assert Conversation(0, "auto").run("media", '{"action":"play"}') == '{"ok": true}'


def test_missing_calls_and_answers_end_a_conversation():
    conversation = Conversation(0, "required")
    with pytest.raises(ValueError, match="no call"):
        conversation.count_round(0, is_due=True)
    with pytest.raises(ValueError, match="no answer"):
        conversation.end_turn("")
    assert not +conversation.found
