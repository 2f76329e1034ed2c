"""Shapes of rows as tools and people write them, each against the messages that must come out."""

import json
from pathlib import Path

import pytest

from stages.common.errors import InputError
from stages.common.sources.files.entries import BadRow
from stages.common.sources.files.messages import read_conversation
from stages.common.sources.files.shapes import Columns, detect_shape

PATH = Path("data/rows.jsonl")


def shape_of(records, **columns):
    return detect_shape(PATH, records, Columns(**columns))


def messages_of(record, others=(), **columns):
    shape = shape_of([record, *others], **columns)
    return [(m.role, m.content) for m in read_conversation(record, shape, set())[0]]


def fault_of(record):
    with pytest.raises(BadRow) as error:
        messages_of(record)
    return error.value.reason


def turns(*pairs, **last):
    found = [{"role": role, "content": content} for role, content in pairs]
    found[-1] |= last
    return {"messages": found}


USER, ANSWER = ("user", "where is it?"), ("assistant", "on its way")


# Chat: OpenAI's fine-tuning file


def test_a_chat_of_several_turns_keeps_them_all_and_drops_the_names_of_speakers():
    record = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hi", "name": "anna"},
            {"role": "assistant", "content": "hello", "weight": 0},
            {
                "role": "user",
                "content": [{"type": "text", "text": "where "}, {"type": "text", "text": "is it?"}],
            },
            {"role": "assistant", "content": "on its way", "weight": 1},
        ]
    }
    assert messages_of(record) == [
        ("system", "Be brief."),
        ("user", "hi"),
        ("assistant", "hello"),
        USER,
        ANSWER,
    ]


def test_the_role_developer_is_the_system():
    assert messages_of(turns(("developer", "Be brief."), USER, ANSWER))[0] == ("system", "Be brief.")


@pytest.mark.parametrize("roles", [("system", "developer"), ("developer", "system")])
def test_the_first_messages_of_both_roles_are_one(roles):
    first = zip(roles, ("Be brief.", "Be kind."), strict=True)
    assert messages_of(turns(*first, USER, ANSWER)) == [("system", "Be brief.\n\nBe kind."), USER, ANSWER]


def test_an_answer_of_weight_zero_is_not_learned():
    assert fault_of(turns(USER, ("assistant", "wrong"), weight=0)) == "weight_zero"
    assert messages_of(turns(USER, ANSWER, ("user", "sure?"), ("assistant", "no"), weight=0)) == [
        USER,
        ANSWER,
    ]
    assert fault_of(turns(USER, ANSWER, loss_weight=0.0)) == "weight_zero"
    assert fault_of(turns(USER, ANSWER, train=False)) == "weight_zero"
    assert fault_of(turns(USER, ANSWER, weight=0.5)) == "wrong_messages"


def test_keys_that_parquet_fills_with_null_are_no_calls():
    assert messages_of(turns(USER, ANSWER, tool_calls=None, weight=None)) == [USER, ANSWER]


def test_a_picture_in_the_content_is_rejected():
    assert fault_of(turns(("user", [{"type": "image_url", "image_url": "x"}]), ANSWER)) == "not_text"


# ShareGPT


@pytest.mark.parametrize(
    "roles", [("human", "gpt"), ("Human", "GPT "), ("user", "assistant"), ("user", "chatgpt")]
)
def test_sharegpt_is_read_under_its_names_of_roles(roles):
    record = {
        "id": "x1",
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": roles[0], "value": USER[1]},
            {"from": roles[1], "value": ANSWER[1]},
        ],
    }
    assert messages_of(record) == [("system", "Be brief."), USER, ANSWER]
    assert shape_of([record]).name == "sharegpt"


def test_the_system_column_comes_first():
    record = {
        "system": "Be brief.",
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
    }
    assert messages_of(record) == [("system", "Be brief."), ("user", "a"), ("assistant", "b")]


# Alpaca


def test_the_input_of_alpaca_follows_its_instruction():
    record = {"instruction": "Translate to French.", "input": "cheese", "output": "fromage"}
    assert messages_of(record) == [("user", "Translate to French.\n\ncheese"), ("assistant", "fromage")]
    assert messages_of(record | {"input": ""}) == [("user", "Translate to French."), ("assistant", "fromage")]
    assert shape_of([record]).name == "alpaca"


def test_the_input_of_the_first_rows_may_be_empty():
    empty = [{"instruction": f"i{n}", "input": "", "output": f"o{n}"} for n in range(999)]
    record = {"instruction": "Translate.", "input": "cheese", "output": "fromage"}
    assert messages_of(record, others=empty)[0] == ("user", "Translate.\n\ncheese")


def test_system_and_history_of_alpaca_are_read():
    record = {"instruction": "c", "input": "", "output": "d", "system": "s", "history": [["a", "b"]]}
    assert messages_of(record) == [
        ("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"),
    ]  # fmt: skip


# Prompt and completion, question and answer, text and label


def test_prompt_and_completion_may_be_conversations():
    record = {
        "prompt": [{"role": "user", "content": "where is it?"}],
        "completion": [{"role": "assistant", "content": "on its way"}],
    }
    assert messages_of(record) == [USER, ANSWER]


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        ({"Question": "q?", "Answer": "a"}, ("Question", "Answer")),
        ({"id": 1, "Customer Message": "q?", "Reply": "a"}, ("Customer Message", "Reply")),
        ({"Frage": "q?", "Antwort": "a"}, ("Frage", "Antwort")),
        ({"text": "q?", "label": 3, "label_text": "card"}, ("text", "label_text")),
        ({"utterance": "q?", "intent": "card"}, ("utterance", "intent")),
        ({"nl": "list files", "command": "ls"}, ("nl", "command")),
        ({"input": "q?", "output": "a"}, ("input", "output")),
        ({"問題": "q?", "回答": "a"}, ("問題", "回答")),
    ],
)
def test_columns_are_found_by_their_names(record, columns):
    shape = shape_of([record])
    assert (shape.prompt, shape.completion) == columns


def test_a_name_is_compared_whole():
    """ "text" in "context" took the place of the question in another project (unsloth#11292)."""
    record = {"context": "Paris is in France.", "question": "Where is Paris?", "answer": "France"}
    assert messages_of(record)[0] == ("user", "Where is Paris?\n\nParis is in France.")


def test_a_column_of_few_short_values_is_the_label_whatever_its_name():
    records = [{"a": f"my card {n} is lost", "b": ["card", "refund"][n % 2]} for n in range(30)]
    shape = shape_of(records)
    assert (shape.prompt, shape.completion) == ("a", "b")
    shape = shape_of([{"b": record["b"], "a": record["a"]} for record in records])
    assert (shape.prompt, shape.completion) == ("a", "b")


def test_a_column_that_numbers_the_rows_is_neither():
    records = [{"Nr": str(n), "Frage": f"Wo ist {n}?", "Art": ["a", "b"][n % 2]} for n in range(30)]
    shape = shape_of(records)
    assert (shape.prompt, shape.completion) == ("Frage", "Art")


def test_two_columns_of_classes_are_undecided():
    records = [{"text": f"t{n}", "topic": "a", "sentiment": "b"} for n in range(9)]
    with pytest.raises(InputError, match="prompt is 'text'") as error:
        shape_of(records)
    assert "completion_column" in str(error.value)
    assert shape_of(records, completion="topic").prompt == "text"


def test_two_columns_without_a_hint_are_named_with_their_content_and_the_keys():
    records = [{"left": f"some text {n}", "right": f"other text {n}"} for n in range(30)]
    with pytest.raises(InputError) as error:
        shape_of(records)
    text = str(error.value)
    assert "left: 'some text 0'" in text
    assert "right: 'other text 0'" in text
    assert "set `prompt_column` and `completion_column`" in text
    shape = shape_of(records, prompt="right")
    assert (shape.prompt, shape.completion) == ("right", "left")


def test_one_column_is_no_row():
    with pytest.raises(InputError, match="there is no answer to learn"):
        shape_of([{"text": "once upon a time"}])


def test_columns_that_are_named_go_before_detection():
    record = {"prompt": "a", "completion": "b", "q": "c", "r": "d", "more": "e"}
    assert messages_of(record, prompt="q", context="more", completion="r") == [
        ("user", "c\n\ne"),
        ("assistant", "d"),
    ]


def test_a_conversation_about_a_picture_is_rejected():
    assert fault_of(turns(USER, ANSWER) | {"images": ["a.jpg"]}) == "not_text"
    assert messages_of(turns(USER, ANSWER) | {"images": []}) == [USER, ANSWER]


def test_two_columns_of_conversations_are_undecided():
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(InputError, match="'first' and 'second' are both"):
        shape_of([{"first": chat, "second": chat}])
    assert shape_of([{"first": chat, "second": chat}], messages="second").messages == "second"


def test_numbers_and_objects_are_answers():
    assert messages_of({"text": "q", "label": 3})[1] == ("assistant", "3")
    assert messages_of({"prompt": "q", "completion": {"a": [1, 2]}})[1] == ("assistant", '{"a":[1,2]}')
    assert fault_of({"prompt": "q", "completion": {"a": float("nan")}}) == "not_text"


def test_a_conversation_in_a_csv_cell_is_json():
    record = {"messages": json.dumps(turns(USER, ANSWER)["messages"])}
    assert messages_of(record) == [USER, ANSWER]
