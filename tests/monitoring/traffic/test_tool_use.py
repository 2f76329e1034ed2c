import json

import pytest

from monitoring.traffic.columns import TOOL_FEATURES
from monitoring.traffic.features import compute_feature_tables, list_watched_columns
from stages.common.messages import Message, ToolCall, format_malformed
from stages.common.params.loop import FeatureSettings
from tests.monitoring.store import exchange
from tests.monitoring.traffic.test_features import batch

SETTINGS = FeatureSettings(max_categories=4, embeddings="none", cost_per_hour=0.0)
TOOL = {"type": "function", "function": {"name": "light", "parameters": {"type": "object"}}}
PARAMETERS = json.dumps({"json_schema": None, "tools": [TOOL, TOOL], "tool_choice": "auto"})
CALL = ToolCall("light", '{"area":"hall"}')
ONE, TWO = (Message("assistant", "", calls).answer for calls in ((CALL,), (CALL, ToolCall("blind", "{}"))))
ASKED = [{"role": "user", "content": "light"}]
TOLD = [
    *ASKED,
    {"role": "assistant", "content": "", "tool_calls": [{"id": "a", "name": "light", "arguments": {}}]},
    {"role": "tool", "content": "on", "tool_call_id": "a"},
]


def made_of(*answers, messages=ASKED, parameters=PARAMETERS, **changes):
    events = [
        exchange(n, answer=answer, messages=json.dumps(messages), parameters=parameters, **changes)
        for n, answer in enumerate(answers)
    ]
    data = batch(*events)
    columns = list_watched_columns([batch(*events * 5)], SETTINGS)
    (table,) = compute_feature_tables([data], columns, SETTINGS)
    return table


def test_calls_become_columns():
    table = made_of(ONE, TWO, "It is on.", format_malformed("<tool_call>{"), " ")
    assert {column.name for column in TOOL_FEATURES} <= set(table.column_names)
    assert table["called_tools"].to_pylist() == ["light", "blind+light", "(text)", "(malformed)", "(empty)"]
    assert table["calls"].to_pylist() == [1, 2, 0, None, 0]
    assert table["malformed_call"].to_pylist() == [0, 0, 0, 1, 0]
    assert table["offered_tools"].to_pylist() == [2] * 5
    assert table["answer_form"].to_pylist() == ["(calls)", "(calls)", "(text)", "(malformed call)", "(empty)"]
    assert not [name for name in table.column_names if name.startswith("answer.")]


def test_an_answer_to_a_result_is_told_apart():
    again = [*TOLD, {"role": "assistant", "content": "It is on."}, {"role": "user", "content": "thanks"}]
    told, thanked = made_of("It is on.", messages=TOLD), made_of("You are welcome.", messages=again)
    assert [told["after_result"][0].as_py(), thanked["after_result"][0].as_py()] == [1.0, 0.0]
    assert thanked["turns"][0].as_py() == 5


def test_a_session_has_its_turns_at_its_last_request():
    columns = list_watched_columns([batch(*(exchange(n, parameters=PARAMETERS) for n in range(9)))], SETTINGS)
    data = batch(*(exchange(n, session="s", parameters=PARAMETERS) for n in range(3)))
    (table,) = compute_feature_tables([data], columns, SETTINGS, session_turns={"r00002": 3})
    assert table["session_turns"].to_pylist() == [None, None, 3.0]


@pytest.mark.parametrize("changes", [{"finish_reason": "cancelled"}, {"answer": None, "finish_reason": None}])
def test_an_answer_that_was_cut_off_has_no_calls(changes):
    answer = changes.pop("answer", ONE)
    table = made_of(answer, **changes)
    assert [table[name][0].as_py() for name in ("called_tools", "calls", "malformed_call")] == [None] * 3
    assert table["offered_tools"][0].as_py() == 2


def test_traffic_without_tools_has_none_of_these_columns():
    table = made_of('{"intent":"On"}', "text", parameters="{}")
    assert not {column.name for column in TOOL_FEATURES} & set(table.column_names)


def test_the_classes_of_a_task_are_watched_in_traffic_that_has_tools_too():
    labelled = [exchange(n, answer=("yes", "no")[n % 2], parameters="{}") for n in range(30)]
    with_tools = [
        exchange(30 + n, answer=answer, parameters=PARAMETERS) for n, answer in enumerate((ONE, "Hm."))
    ]
    data = batch(*labelled, *with_tools * 4)
    columns = list_watched_columns([data], SETTINGS)
    (table,) = compute_feature_tables([data], columns, SETTINGS)
    assert table["answer_class"].to_pylist() == ["yes", "no"] * 15 + [None] * 8
    assert table["called_tools"].to_pylist()[30:32] == ["light", "(text)"]
    only_tools = list_watched_columns([batch(*with_tools * 20)], SETTINGS)
    assert "answer_class" not in {column.name for column in only_tools}
