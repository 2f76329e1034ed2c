import pytest

from stages.common.messages import (
    Message,
    ToolCall,
    find_conversation_problem,
    format_calls,
    read_calls,
    read_strict_json,
)

CALL = ToolCall("lamp", '{"on":true}', "c1")
OTHER = ToolCall("fan", "{}", "c2")
USER, ASKS = Message("user", "lamp on"), Message("assistant", "", (CALL,))
DONE, ANSWER = Message("tool", "done", tool_call_id="c1"), Message("assistant", "It is on.")


@pytest.mark.parametrize("content", ["", "Just a moment.", '{"tool_calls":[]}', 'a "quote"\n☀'])
def test_calls_as_text_are_read_back_without_their_ids(content):
    text = format_calls(content, [CALL, OTHER])
    assert read_calls(text) == (content, (ToolCall("lamp", '{"on":true}'), ToolCall("fan", "{}")))


@pytest.mark.parametrize(
    "text",
    ["", "It is on.", "[]", '{"tool_calls":[]}', '{"tool_calls":[{"name":"a"}]}',
     '{"tool_calls":[{"name":"a",',
     '{"tool_calls":[{"name":"a","arguments":"{}"}]}',
     '{"content":1,"tool_calls":[{"name":"a","arguments":{}}]}',
     '{"tool_calls":[{"name":"a","arguments":{}}],"more":1}', '{"content":' + "[" * 100_000],
)  # fmt: skip
def test_other_text_is_no_call(text):
    assert read_calls(text) is None


def test_an_answer_is_the_text_of_its_turn():
    assert ANSWER.answer == "It is on."
    assert ASKS.answer == '{"tool_calls":[{"name":"lamp","arguments":{"on":true}}]}'


@pytest.mark.parametrize(
    "messages",
    [
        [USER, ASKS],
        [USER, ASKS, DONE, ANSWER],
        [
            USER,
            Message("assistant", "", (CALL, OTHER)),
            Message("tool", "b", tool_call_id="c2"),
            DONE,
            ANSWER,
        ],
        [USER, Message("assistant", "", (ToolCall("lamp", "{}"),)), Message("tool", "x"), ANSWER],
        [USER, ASKS, USER, ANSWER],
    ],
)
def test_calls_with_their_results_are_a_conversation(messages):
    assert find_conversation_problem(messages) is None


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([USER, DONE, ANSWER], "message 2 is the result of no call"),
        ([USER, ASKS, Message("tool", "x", tool_call_id="c9"), ANSWER], "'c9'"),
        ([USER, ASKS, DONE, DONE, ANSWER], "message 4 is the result of no call"),
        ([USER, ASKS, ANSWER], "before the results of all calls"),
        ([USER, Message("assistant", "", (CALL, CALL)), DONE, ANSWER], "two calls with one id"),
        ([Message("user", "a", (CALL,)), ANSWER], "not the assistant's"),
        ([USER, Message("assistant", ""), USER, ANSWER], "message 2 has neither text nor a call"),
    ],
)
def test_calls_and_results_that_do_not_belong_together_are_named(messages, problem):
    assert problem in (find_conversation_problem(messages) or "")


def test_json_of_a_key_twice_and_of_numbers_that_json_has_not_is_refused():
    assert read_strict_json('{"a": [{"a": 1}, 1e3]}') == {"a": [{"a": 1}, 1000.0]}
    for text in ('{"a": 1, "a": 1}', '[{"b": {"a": 1, "a": 2}}]', "NaN", '{"a": -Infinity}', "[Infinity]"):
        with pytest.raises(ValueError, match=r"a key is given twice|is not JSON"):
            read_strict_json(text)
