"""Tools, their schemas and conversations with calls under random input: no request gets a server error."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.services.api.test_fuzz import ANY_JSON, QUIET, SCHEMAS, VALUES, send
from tests.services.serving import load_paged, serving
from tests.services.tool_models import tool_files

ROUTE = "/v1/chat/completions"
NAMES = st.sampled_from(["a", "a-b", "lamp", "a.b", "", "x" * 65, "\ud83d", "<tool_call>"])
ARGUMENTS = st.sampled_from(["{}", "", '{"a":1}', "[]", "on", '{"a":1e999}', '{"a":NaN}', '"', "{" * 500])
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
    answers = {"default_max_tokens": 4, "max_tokens": 30}
    files = tool_files(folder / "model")
    with serving(folder, files, load=load_paged, answers=answers, guard={"max_schema_cpu_s": 0.3}) as running:
        engine = running.handler.pool.champion.engine
        yield running
        assert running.handler.pool.champion.engine is engine, "the engine was started again"
        assert engine.broken is None


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
