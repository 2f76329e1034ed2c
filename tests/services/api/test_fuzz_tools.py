"""Tools, their schemas and conversations with calls under random input: no request gets a server error."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.services.api.test_fuzz import ANY_JSON, ITEMS, QUIET, SCHEMAS, VALUES, send
from tests.services.serving import serving_unbroken
from tests.services.tool_models import tool_files

ROUTE = "/v1/chat/completions"
NAMES = st.sampled_from(["a", "a-b", "lamp", "a.b", "", "x" * 65, "\ud83d", "<tool_call>"])
ARGUMENTS = st.sampled_from(
    [
        "{}",
        "",
        '{"a":1}',
        "[]",
        "on",
        '{"a":1e999}',
        '{"a":NaN}',
        '"',
        "{" * 500,
        r'{"a":"\ud83d"}',
        r'{"\udfff":1}',
    ]
)
TOOLS = st.lists(
    st.fixed_dictionaries(
        {
            "type": st.sampled_from(["function"] * 9 + ["custom"]),
            "function": st.fixed_dictionaries(
                {"name": NAMES}, optional={"parameters": SCHEMAS, "strict": st.booleans() | VALUES}
            ),
        }
    ),
    max_size=3,
)
CALLS = st.lists(
    st.fixed_dictionaries(
        {
            "id": st.sampled_from(["x", "y", ""]),
            "type": st.just("function"),
            "function": st.fixed_dictionaries({"name": NAMES, "arguments": ARGUMENTS}),
        }
    ),
    max_size=2,
)
TURNS = st.one_of(
    st.fixed_dictionaries({"role": st.just("assistant"), "tool_calls": CALLS}, optional={"content": VALUES}),
    st.fixed_dictionaries(
        {"role": st.just("tool"), "content": st.text(max_size=9), "tool_call_id": st.sampled_from(["x", "y"])}
    ),
    st.just({"role": "user", "content": "on"}),
)
CHOICES = st.sampled_from(["auto", "none", "required", None, {"type": "function", "function": {"name": "a"}}])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    files = tool_files(folder / "model")
    with serving_unbroken(folder, files, default_max_tokens=4, max_tokens=30) as running:
        yield running


@pytest.mark.slow
def test_any_tools_are_held_or_refused(server):
    @given(
        tools=TOOLS,
        choice=CHOICES | ANY_JSON,
        parallel=st.sampled_from([None, True, False]),
        turns=st.lists(TURNS, max_size=3),
        temperature=st.sampled_from([0, 1.0]),
    )
    @settings(max_examples=250, **QUIET)
    def refuse_or_answer(tools, choice, parallel, turns, temperature):
        body = {"tools": tools, "tool_choice": choice, "parallel_tool_calls": parallel, "max_tokens": 30}
        messages = [{"role": "user", "content": "on"}, *turns]
        send(client, ROUTE, {"messages": messages, "temperature": temperature, **body})

    with server.client() as client:
        refuse_or_answer()


@pytest.mark.slow
def test_any_tools_of_a_response_are_held_or_refused(server):
    def flatten(part):
        """Return a tool or a choice as the Responses API has it."""
        inner = part.get("function") if isinstance(part, dict) else None
        return {**part, **inner, "function": None} if isinstance(inner, dict) else part

    @given(
        tools=TOOLS,
        choice=CHOICES | ANY_JSON,
        parallel=st.sampled_from([None, True, False]),
        items=ITEMS,
        stream=st.booleans(),
    )
    @settings(max_examples=250, **QUIET)
    def refuse_or_answer(tools, choice, parallel, items, stream):
        body = {
            "tools": [*map(flatten, tools)],
            "tool_choice": flatten(choice),
            "parallel_tool_calls": parallel,
        }
        send(client, "/v1/responses", {"input": items, "stream": stream, "max_output_tokens": 30, **body})

    with server.client() as client:
        refuse_or_answer()
