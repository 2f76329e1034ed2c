import json

import pytest

from stages.common.errors import InputError
from stages.common.messages import Message
from stages.common.sources.feedback import collect_feedback


def line(**changes):
    messages = [{"role": "user", "content": "lamp on"}, {"role": "assistant", "content": '{"intent":"On"}'}]
    return {
        "id": "of no matter",
        "messages": messages,
        "source": "feedback",
        "license": "cc0-1.0",
        "group": "feedback/0123456789abcdef",
        "tags": {"feedback": "correction", "intent": "On"},
        "origin": "feedback",
        **changes,
    }


@pytest.fixture
def write(tmp_path):
    def lines(*records):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return lines


def test_rows_keep_their_license_group_and_tags_and_get_the_system_prompt(write):
    collected = collect_feedback(write(line()), "Be brief.", "stop")
    (row,) = collected.rows
    assert row.messages[:2] == (Message("system", "Be brief."), Message("user", "lamp on"))
    assert (row.license, row.group, row.origin) == ("cc0-1.0", "feedback/0123456789abcdef", "feedback")
    assert row.tags == {"feedback": "correction", "intent": "On"}
    assert collected.metrics == {"file_there": True, "by_kind": {"correction": 1}}


def test_a_system_message_of_its_own_stays_and_none_is_made_up(write):
    own = [{"role": "system", "content": "Mine."}, *line()["messages"]]
    path = write(line(), line(messages=own))
    assert [row.messages[0].content for row in collect_feedback(path, None, "stop").rows] == [
        "lamp on",
        "Mine.",
    ]
    assert [row.messages[0].content for row in collect_feedback(path, "S.", "stop").rows] == ["S.", "Mine."]


def test_without_the_file_or_with_an_empty_one_there_are_no_rows(tmp_path, write):
    nothing = collect_feedback(tmp_path / "rows.jsonl", None, "stop")
    assert (nothing.rows, nothing.metrics) == ((), {"file_there": False})
    assert collect_feedback(write(), None, "stop").rows == ()


def test_bad_lines_are_set_aside_or_stop_the_run(write):
    path = write(line(), line(group=""), line(tags=["x"]), line(messages=[{"role": "user", "content": "x"}]))
    collected = collect_feedback(path, None, "reject")
    assert len(collected.rows) == 1
    seen = [(reject.line, reject.reason) for reject in collected.rejected]
    assert seen == [(2, "missing_field"), (3, "wrong_tags"), (4, "no_answer")]
    with pytest.raises(InputError, match=r"3 bad rows\n.*rows\.jsonl:2: missing_field: no 'group'"):
        collect_feedback(path, None, "stop")


def test_rows_with_calls_keep_their_tools(write):
    call = {"id": "c1", "type": "function", "function": {"name": "lamp", "arguments": "{}"}}
    tool = {"type": "function", "function": {"name": "lamp"}}
    messages = [
        {"role": "user", "content": "on"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    (row,) = collect_feedback(write(line(messages=messages, tools=[tool])), None, "stop").rows
    assert (row.answer, row.tools[0].value) == ('{"tool_calls":[{"name":"lamp","arguments":{}}]}', tool)
    (reject,) = collect_feedback(write(line(tools=["lamp"])), None, "reject").rejected
    assert (reject.line, reject.reason) == (1, "wrong_tools")
