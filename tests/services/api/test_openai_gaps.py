"""Every gap of the table is refused under its name, and the table has every field of OpenAI's client."""

import json

import pytest

from services.api.embeddings.schemas import EmbeddingsRequest
from services.api.fields import IGNORED
from services.api.items.schemas import ResponsesRequest
from services.api.schemas import ChatRequest, CompletionRequest
from tests.services.api.openai_gaps import (
    ANSWERED,
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    GAPS,
    RESPONSES,
    ROUTES,
    TAKEN,
    TAKEN_WITHIN,
)
from tests.services.serving import load_paged, serving
from tests.services.tool_models import tool_files

BODIES = {
    CHAT: ChatRequest,
    COMPLETIONS: CompletionRequest,
    RESPONSES: ResponsesRequest,
    EMBEDDINGS: EmbeddingsRequest,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gaps")
    with serving(folder, tool_files(folder / "model"), load=load_paged) as running:
        yield running


def find_texts(answer):
    """Return the parts of an answer that its request decides."""
    return answer.get("choices") or answer.get("data") or [item["content"] for item in answer["output"]]


@pytest.mark.parametrize(
    ("path", "gap"),
    [(path, gap) for path, gaps in GAPS.items() for gap in gaps],
    ids=lambda part: part if isinstance(part, str) else json.dumps(part.sent)[:60],
)
def test_what_is_not_done_is_refused_under_its_name(client, path, gap):
    refused = client.post(path, json={**ANSWERED[path], **gap.sent})
    assert refused.status_code == 422, refused.text
    error = refused.json()["error"]
    assert error["param"] == gap.param
    assert error["message"].startswith(f"{gap.param}: ") and gap.instead in error["message"]


@pytest.mark.parametrize("path", ANSWERED)
def test_what_is_taken_changes_no_answer(client, path):
    plain = client.post(path, json=ANSWERED[path])
    taken = client.post(path, json={**ANSWERED[path], **TAKEN[path]})
    assert taken.status_code == 200, taken.text
    assert find_texts(taken.json()) == find_texts(plain.json())


def leave_out(value, path):
    """Return a JSON value without the part at a path such as `messages.1.name`."""
    name, _, rest = path.partition(".")
    if isinstance(value, list):
        place = int(name)
        return [*value[:place], leave_out(value[place], rest), *value[place + 1 :]]
    if rest:
        return {**value, name: leave_out(value[name], rest)}
    return {key: part for key, part in value.items() if key != name}


@pytest.mark.parametrize(
    ("path", "taken"),
    [(path, taken) for path, several in TAKEN_WITHIN.items() for taken in several],
    ids=lambda part: part if isinstance(part, str) else part.param,
)
def test_what_is_taken_within_an_object_changes_no_answer(client, path, taken):
    without = leave_out(taken.sent, taken.param)
    assert without != taken.sent
    answers = [client.post(path, json={**ANSWERED[path], **sent}) for sent in (taken.sent, without)]
    assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
    (one, texts), (other, same) = ((a.json()["usage"], find_texts(a.json())) for a in answers)
    assert (one, texts) == (other, same)


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_no_alternatives_are_what_is_given_anyway(client, path):
    assert client.post(path, json={**ANSWERED[path], "top_logprobs": 0}).status_code == 200


@pytest.mark.parametrize(("method", "path", "status"), ROUTES, ids=str)
def test_a_route_that_is_not_there_is_named(client, method, path, status):
    refused = client.request(method, path, json={})
    assert refused.status_code == status
    assert path in refused.json()["error"]["message"]


def read_openai_fields():
    """Return the fields of each route's request as OpenAI's client has them."""
    from openai.types import completion_create_params as completion
    from openai.types import embedding_create_params as embedding
    from openai.types.chat import completion_create_params as chat
    from openai.types.responses import response_create_params as response

    kinds = {
        CHAT: chat.CompletionCreateParamsStreaming,
        COMPLETIONS: completion.CompletionCreateParamsStreaming,
        RESPONSES: response.ResponseCreateParamsStreaming,
        EMBEDDINGS: embedding.EmbeddingCreateParams,
    }
    return {
        path: {name for base in kind.__mro__ for name in getattr(base, "__annotations__", ())}
        | {name for base in kind.__orig_bases__ for name in getattr(base, "__annotations__", ())}
        for path, kind in kinds.items()
    }


@pytest.mark.parametrize("path", BODIES)
def test_every_field_of_openai_is_done_taken_or_in_the_table(path):
    fields = read_openai_fields()[path]
    assert {"model", "user"} <= fields
    done = {field.alias or name for name, field in BODIES[path].model_fields.items()}
    refused = {gap.param.split(".")[0] for gap in GAPS[path]}
    assert fields - done - set(TAKEN[path]) - refused == set()
    assert set(TAKEN[path]) <= IGNORED, "a field that is taken is not ignored by its name"
    assert set(TAKEN[path]) >= (fields & IGNORED) - done
