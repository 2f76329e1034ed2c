"""The routes under random input: no request gets a server error, and none ends the engine."""

import json
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.api.ask import AskRequest
from services.api.embeddings.schemas import EmbeddingsRequest
from services.api.items.schemas import KINDS, ResponsesRequest
from services.api.schemas import ChatRequest, CompletionRequest, FeedbackRequest
from tests.services.bento import serving_bento
from tests.services.serving import paged_files, serving_unbroken

STATUSES = {200, 400, 401, 404, 405, 413, 415, 422, 429, 499}
QUIET = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}

# Every route of the real service that a client may call; /v1/models/{model} is called with many names.
GET_ROUTES = [
    "/",
    "/page/page.js",
    "/page/",
    "/v1/models",
    "/v1/models/{model}",
    "/openapi.json",
    "/docs.json",
]
GET_ROUTES += ["/livez", "/readyz", "/healthz", "/metrics", "/schema.json"]

BODIES = {
    "/v1/chat/completions": (ChatRequest, {"messages": [{"role": "user", "content": "Hello"}]}),
    "/v1/completions": (CompletionRequest, {"prompt": "Hello"}),
    "/v1/responses": (ResponsesRequest, {"input": "Hello"}),
    "/v1/embeddings": (EmbeddingsRequest, {"input": "Hello"}),
    "/v1/feedback": (FeedbackRequest, {"request_id": "req_1", "thumb": "up"}),
}

OTHERS = {"stream": True, "temperature": 1.0, "encoding_format": "base64"}  # sent with a field of any value
NUMBERS = [0, -0.0, 1, -1, 2, 0.5, 1e-320, 1e-40, 1e-5, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 2**70]
NUMBERS += [1e308, -1e308, float("nan"), float("inf"), 10**400]
TEXTS = [
    "",
    " ",
    "\0",
    "\ud83d",
    "a\udfff",
    "\ufeff",
    "\u2028",
    "<|im_end|>",
    "a" * 300,
    "\U0001f600",
    "$(id)",
]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.sampled_from(TEXTS),
    st.text(max_size=20),
    st.integers(),
    st.floats(),
)
ANY_JSON = st.recursive(
    VALUES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)
TYPES = ["string", "integer", "number", "object", "array", "boolean", "null", "nothing"]
KEYWORDS = {
    "type": st.sampled_from(TYPES),
    "enum": st.lists(VALUES, max_size=4),
    "const": VALUES,
    "required": st.lists(st.sampled_from(["a", "b"]), max_size=2),
    "pattern": st.sampled_from(["^a+$", "(a*)*b", "[", "(?=a)", "^(a|b){1,900}$", "\\p{L}", "\ud83d"]),
    "format": st.sampled_from(["date-time", "email", "uuid", "ipv4", "unheard-of"]),
    "$ref": st.sampled_from(["#", "#/$defs/a", "#/properties/a", "http://127.0.0.1:1/x", "\ud83d"]),
    **{
        name: st.sampled_from(NUMBERS)
        for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength")
    },
    **{name: st.sampled_from(NUMBERS) for name in ("maxLength", "minItems", "maxItems", "minProperties")},
}


def combine(inner):
    named = st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2)
    several = st.lists(inner, max_size=3)
    return st.fixed_dictionaries(
        {},
        optional={
            **KEYWORDS,
            **dict.fromkeys(("properties", "$defs"), named),
            **dict.fromkeys(("anyOf", "allOf", "oneOf", "prefixItems"), several),
            **dict.fromkeys(("items", "not", "additionalProperties", "contains", "if"), inner),
        },
    )


SCHEMAS = st.recursive(st.fixed_dictionaries({}, optional=KEYWORDS) | st.booleans() | VALUES, combine)
FORMATS = SCHEMAS.map(lambda schema: {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "developer", "tool"]), "content": ANY_JSON}
    ),
    max_size=3,
)

ITEMS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(KINDS) | VALUES,
            "role": st.sampled_from(["user", "system", "assistant", "developer", "tool"]),
            "call_id": st.sampled_from(["x", "y", ""]),
            "name": st.sampled_from(["a", "a.b", ""]),
            "arguments": st.sampled_from(["{}", "", "[]", '{"a":1e999}', "{" * 500, r'{"a":"\ud83d"}']),
            **dict.fromkeys(
                ("content", "output"),
                ANY_JSON
                | st.lists(
                    st.fixed_dictionaries(
                        {"type": st.sampled_from(["input_text", "output_text", "reasoning_text"])},
                        optional={"text": VALUES},
                    ),
                    max_size=2,
                ),
            ),
        },
    ),
    max_size=4,
).map(lambda items: [{"role": "user", "content": "on"}, *items])
TEXT_FORMATS = SCHEMAS.map(
    lambda schema: {"format": {"type": "json_schema", "name": "x", "schema": schema}},
)
SHAPED = {"response_format": FORMATS, "messages": MESSAGES, "input": ITEMS, "text": TEXT_FORMATS}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    files = paged_files(folder / "model")
    with serving_unbroken(folder, files, default_max_tokens=4, max_tokens=8) as running:
        yield running


@pytest.mark.slow
def test_no_input_breaks_the_service(server):
    import schemathesis
    from schemathesis import GenerationMode

    described = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in described.get_all_operations()]
    assert {operation.path for operation in operations} >= BODIES.keys()
    for operation in operations:
        for mode in GenerationMode:  # what the description allows, and what it does not

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(max_examples=40, **QUIET)
            def refuse_or_answer(case):
                response = case.call(timeout=30)
                assert response.status_code in STATUSES, response.text
                if response.status_code >= 400:
                    assert set(response.json()["error"]) >= {"message", "type", "param", "code"}
                assert "Traceback" not in response.text

            if mode is GenerationMode.POSITIVE or operation.body:
                refuse_or_answer()  # else there is nothing to get wrong


def send(client, path, body):
    """Send a body as clients can, with NaN and half surrogate pairs; check that it is answered or refused."""
    headers = {"Content-Type": "application/json"}
    response = client.post(path, content=json.dumps(body).encode(), headers=headers)
    assert response.status_code in STATUSES, (response.status_code, response.text, body)
    if response.status_code >= 400:
        assert set(response.json()["error"]) >= {"message", "type", "param", "code"}
    assert "Traceback" not in response.text


def name_fields():
    """Return every field of every route, under the name by which it is sent."""
    return [
        (path, field.alias or name)
        for path, (kind, _) in BODIES.items()
        for name, field in kind.model_fields.items()
    ]


@pytest.mark.parametrize(("path", "field"), name_fields())
def test_every_field_at_its_edges_is_answered_or_refused(server, path, field):
    with server.client() as client:
        for value in [*NUMBERS, *TEXTS, None, True, [], {}, [{}], ["a"], [-1], [2**70], [1.5], {"a": 1}]:
            send(client, path, {**BODIES[path][1], field: value})


@pytest.mark.slow
@pytest.mark.parametrize(("path", "field"), name_fields())
def test_every_field_takes_or_refuses_any_json(server, path, field):
    kind, body = BODIES[path]
    further = [{}, *({name: value} for name, value in OTHERS.items() if name in kind.model_fields)]
    shaped = SHAPED.get(field, st.lists(VALUES, max_size=4))

    @given(value=ANY_JSON | shaped, others=st.sampled_from(further))
    @settings(max_examples=40, **QUIET)
    def refuse_or_answer(value, others):
        send(client, path, {**body, **others, field: value})

    with server.client() as client:
        refuse_or_answer()


@pytest.mark.slow
def test_any_schema_is_held_or_refused(server):
    @given(wanted=FORMATS, temperature=st.sampled_from([0, 1e-320, 1.0, 2.0]), seed=st.integers(-3, 3))
    @settings(max_examples=400, **QUIET)
    def refuse_or_answer(wanted, temperature, seed):
        body = {"response_format": wanted, "temperature": temperature, "seed": seed, "logprobs": True}
        send(client, "/v1/chat/completions", {**BODIES["/v1/chat/completions"][1], **body})

    with server.client() as client:
        refuse_or_answer()


@pytest.fixture(scope="module")
def bento(tmp_path_factory):
    """The service with all that BentoML adds: /ask, the probes, metrics and descriptions."""
    with serving_bento(tmp_path_factory.mktemp("bento")) as (_, url, log):
        with httpx.Client(base_url=url, timeout=60) as client:
            yield client, log
            assert client.post("/ask", json={"question": "Hello", "max_tokens": 2}).status_code == 200
        text = log.read_text()
        assert "Traceback" not in text and "restarting" not in text, text


@pytest.mark.slow
def test_ask_answers_or_refuses_any_value_of_its_fields(bento):
    client, _ = bento
    common = {"question": "Hello", "max_tokens": 2}
    for field in AskRequest.model_fields:
        for value in [*NUMBERS, *TEXTS, None, True, [], {}, [{}], ["a"]]:
            send(client, "/ask", {**common, field: value})

    @given(
        body=ANY_JSON | st.fixed_dictionaries({}, optional=dict.fromkeys(AskRequest.model_fields, ANY_JSON))
    )
    @settings(max_examples=100, **QUIET)
    def refuse_or_answer(body):
        send(client, "/ask", body)

    refuse_or_answer()


@pytest.mark.slow
def test_every_other_route_answers_or_refuses_any_method_query_and_body(bento):
    client, _ = bento
    described = set(client.get("/docs.json").json()["paths"])
    assert described <= {*GET_ROUTES, *BODIES, "/ask"}, "a route that no test here sends anything to"
    names = st.text(max_size=20) | st.sampled_from(["..", "%2e%2e%2f", "%00", "%ff", "tiny", "champion"])

    @given(
        method=st.sampled_from(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]),
        path=st.sampled_from([*GET_ROUTES, *BODIES, "/ask", "/page/{model}", "/{model}"]),
        name=names,
        query=st.dictionaries(st.text(max_size=5), st.text(max_size=10), max_size=3),
        body=st.none() | ANY_JSON,
    )
    @settings(max_examples=400, **QUIET)
    def refuse_or_answer(method, path, name, query, body):
        path = path.replace("{model}", quote(name, safe="%", errors="replace"))
        content = b"" if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        response = client.request(method, path, params=query, content=content, headers=headers)
        assert response.status_code < 500, (method, path, response.text)
        assert "Traceback" not in response.text

    refuse_or_answer()
