"""One request affects no other, whatever it contains, and the engine keeps running."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from services.answering import prompts
from services.engines.paged.model import PagedModel
from stages.common.chat.template import encode_prompt
from stages.common.messages import Message
from tests.services.schemas.test_trials import fork
from tests.services.serving import ask, load_paged, paged_files, serving


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return paged_files(tmp_path_factory.mktemp("one") / "model")


@pytest.fixture(scope="module")
def server(tmp_path_factory, files):
    guard = {"max_schema_cpu_s": 3.0}  # long enough for others to be answered meanwhile
    with serving(tmp_path_factory.mktemp("service"), files, load=load_paged, guard=guard) as running:
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
    many = [{f"{c}{n}": {"type": "string"} for n in range(300)} for c in "ab"]
    objects = [{"type": "object", "properties": properties} for properties in many]
    refused = ask_for(client, {"anyOf": objects})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "response_format"), refused.text
    assert "outgrew" in refused.json()["error"]["message"]
    assert ask(client, max_tokens=2).status_code == 200


def test_more_optional_properties_than_a_grammar_holds_are_refused_before_decoding(client):
    many = {f"k{n}": {"type": "string"} for n in range(501)}
    refused = ask_for(client, {"type": "object", "properties": many}, stream=True)
    assert refused.status_code == 422 and "501 properties" in refused.json()["error"]["message"]


def test_while_eight_clients_send_the_worst_schemas_all_others_are_answered(server, client):
    request_id = ask(client, max_tokens=2).json()["id"]
    ended = []

    async def send_worst(number):
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as hostile:
            wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": fork(40 + number)}}
            body = {"messages": [{"role": "user", "content": "x"}], "response_format": wanted}
            ended.append(await hostile.post("/v1/chat/completions", json=body))

    def ask_all():
        """Ask all that others ask, in turn; return the statuses, and how many of the worst were done."""
        answers = [
            ask(client, max_tokens=2),
            client.post("/v1/feedback", json={"request_id": request_id, "thumb": "up"}),
            *(client.get(path) for path in ("/", "/v1/models", "/page/service.js")),
        ]
        return [answer.status_code for answer in answers], len(ended)

    async def crowd():
        hostile = [asyncio.create_task(send_worst(number)) for number in range(8)]
        while server.handler.schemas.count_waiting() < 8:
            await asyncio.sleep(0.01)
        asked = [await asyncio.to_thread(ask_all) for _ in range(3)]
        await asyncio.wait(hostile, return_when=asyncio.FIRST_COMPLETED)
        for task in hostile:
            task.cancel()
        await asyncio.wait(hostile)
        return asked

    assert asyncio.run(crowd()) == [([200] * 5, 0)] * 3, "they waited for the worst schemas"
    assert all(answer.status_code in (422, 429) for answer in ended)


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


@pytest.mark.parametrize(
    ("field", "value", "status"),
    [
        *(("seed", seed, 200) for seed in (-1, -(2**63), 2**63 - 1)),
        *(("seed", seed, 422) for seed in (2**63, 2**70, -(2**63) - 1, 1.0, True, float("nan"))),
        *(("temperature", number, 200) for number in (1e-320, 1e-40, -0.0, 2, 2.0)),
        *(("temperature", number, 422) for number in (-1, 1e308, 2**70, float("nan"), float("inf"), -1e-320)),
        *(("top_p", number, 200) for number in (1e-320, 5e-324, 1, 1.0)),
        *(("top_p", number, 422) for number in (0, -0.0, 1.0000001, 2**63, float("nan"))),
        *(("frequency_penalty", number, 200) for number in (-2, 2.0, -0.0, 1e-320)),
        *(("presence_penalty", number, 422) for number in (2.1, -1e308, 2**70, float("nan"))),
        *(("max_tokens", number, 422) for number in (0, -1, -0.0, 1.5, float("nan"))),
        *(("top_logprobs", number, 422) for number in (-1, 21, 2**63, 2**70, -0.0)),
    ],
)
def test_a_number_at_its_edge_is_taken_or_refused_by_name(client, field, value, status):
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["ab", "cd"]}}}
    body = {
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 8,
        "temperature": 1.0,
        "response_format": schema,
        "logprobs": True,
        field: value,
    }
    headers = {"Content-Type": "application/json"}
    answer = client.post("/v1/chat/completions", content=json.dumps(body), headers=headers)
    assert answer.status_code == status, answer.text
    if status == 422:
        assert answer.json()["error"]["param"] == field
    else:
        assert json.loads(answer.json()["choices"][0]["message"]["content"]) in ("ab", "cd")


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "hi \ud83d there"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "\udfff"}]}]},
        {"messages": [{"role": "user", "content": "x"}], "stop": ["a", "\ud83d"]},
        {"messages": [{"role": "user", "content": "x"}], "model": "\ud83d"},
    ],
    ids=["messages.0.content", "messages.0.content.0.text", "stop.1", "model"],
)
def test_half_a_surrogate_pair_is_refused_with_its_place(client, body, request):
    answer = client.post(
        "/v1/chat/completions", content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 422, answer.text
    place = request.node.callspec.id
    assert answer.json()["error"]["param"] == place
    assert answer.json()["error"]["message"] == f"{place}: is not valid Unicode"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "multipleOf": 9999991},
        {"type": "integer", "minimum": 2**70},
        {"type": "number", "minimum": 1e-320, "maximum": 2e-320},
        {"type": "number", "maximum": 1e308},
        {"enum": [float("nan")]},
        {"const": "\ud83d"},
        fork(30),
    ],
    ids=["multipleOf", "2**70", "1e-320", "1e308", "NaN", "surrogate", "2**30 ways"],
)
def test_a_schema_that_no_grammar_holds_is_refused(client, schema):
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"messages": [{"role": "user", "content": "x"}], "response_format": wanted}
    headers = {"Content-Type": "application/json"}
    answer = client.post("/v1/chat/completions", content=json.dumps(body), headers=headers)
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["param"].startswith("response_format")


def test_a_long_prompt_is_checked_and_tokenized_in_a_thread_of_its_own(client, monkeypatch):
    used = []

    def note(do):
        def noted(*given):
            used.append(threading.current_thread().name.startswith("prompt"))
            return do(*given)

        return noted

    for name in ("check_prompt", "_tokenize"):
        monkeypatch.setattr(prompts, name, note(getattr(prompts, name)))
    monkeypatch.setattr(prompts, "MAX_INLINE_CHARS", 100)
    for size in (50, 150):
        assert ask(client, "x" * size, max_tokens=1).status_code == 200
    assert used == [False, False, True, True]


def test_a_prompt_that_is_too_long_is_refused_before_its_schema_is_tried(server, client):
    known = len(server.handler.schemas._verdicts)
    refused = ask_for(
        client, {"const": "a schema of its own"}, messages=[{"role": "user", "content": "x " * 90_000}]
    )
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert len(server.handler.schemas._verdicts) == known


def test_threads_that_share_a_tokenizer_make_the_same_prompts(server):
    tokenizer = server.handler.pool.champion.tokenizer
    marks = ("", *tokenizer.all_special_tokens)
    talks = [[Message("user", f"{marks[n % len(marks)]} light {n} on " * n)] for n in range(60)]
    alone = [encode_prompt(tokenizer, talk) for talk in talks]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(5):
            assert [*threads.map(lambda talk: encode_prompt(tokenizer, talk), talks)] == alone
