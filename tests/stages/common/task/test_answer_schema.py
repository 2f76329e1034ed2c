import json

import pytest

from stages.common.task.answer_schema import derive_schema, find_key_order, fits, read_objects

ANSWERS = [
    {"intent": "On", "domain": "light", "area": "hall"},
    {"intent": "Set", "area": "hall", "degrees": 20},
    {"intent": "Off", "domain": "fan"},
]


def test_labels_and_keys_are_closed_and_values_are_held_to_their_kind():
    assert derive_schema(ANSWERS, "intent") == {
        "type": "object",
        "properties": {
            "intent": {"enum": ["Off", "On", "Set"]},
            "domain": {"type": "string"},
            "area": {"type": "string"},
            "degrees": {"type": "number"},
        },
        "additionalProperties": False,
        "required": ["intent"],
    }


def test_the_keys_stand_in_the_order_in_which_answers_write_them():
    schema = derive_schema(ANSWERS, "intent")
    assert list(schema["properties"]) == ["intent", "domain", "area", "degrees"]
    assert find_key_order([{"b": 1, "c": 1}, {"a": 1, "b": 1}]) == ["a", "b", "c"]


def test_answers_whose_keys_have_no_common_order_are_held_to_no_order():
    assert find_key_order([{"a": 1, "b": 1}, {"b": 1, "a": 1}]) is None
    assert derive_schema([{"a": 1, "b": 1}, {"b": 1, "a": 1}], "a") == {"type": "object"}


@pytest.mark.parametrize(
    "answer",
    [
        {"intent": "Set", "degrees": 20.5},  # whole numbers in training, a fraction here
        {"intent": "On", "domain": "vacuum"},  # a value never seen
        {"intent": "On", "domain": "light", "degrees": 1},  # keys that never met
    ],
)
def test_right_answers_that_training_never_saw_fit(answer):
    assert fits(derive_schema(ANSWERS, "intent"), answer)


@pytest.mark.parametrize(
    "answer",
    [
        {"intent": "Fly"},
        {"domain": "light"},
        {"intent": "On", "colour": "red"},
        {"intent": "Set", "degrees": "20"},
        {"domain": "light", "intent": "On"},
        ["On"],
    ],
)
def test_what_is_no_answer_does_not_fit(answer):
    assert not fits(derive_schema(ANSWERS, "intent"), answer)


def test_a_key_with_values_of_several_kinds_takes_all_of_them():
    answers = [{"step": 1}, {"step": "up"}, {"step": None}, {"step": [1, "a"]}, {"step": {"x": True}}]
    schema = derive_schema(answers, None)
    assert schema["properties"]["step"] == {
        "type": ["array", "null", "number", "object", "string"],
        "items": {"type": ["number", "string"]},
    }
    assert "required" not in schema
    assert all(fits(schema, answer) for answer in [*answers, {"step": []}, {}])
    assert not fits(schema, {"step": True})
    assert not fits(schema, {"step": [None]})


def test_labels_that_are_no_texts_or_are_not_always_there_are_not_closed():
    assert derive_schema([{"n": 1}, {"n": 2}], "n")["properties"] == {"n": {"type": "number"}}
    assert "required" not in derive_schema([{"n": "a"}, {"m": "b"}], "n")


def test_the_schema_means_the_same_to_jsonschema():
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(derive_schema(ANSWERS, "intent"))
    assert all(validator.is_valid(answer) for answer in ANSWERS)
    assert not validator.is_valid({"intent": "Fly"})


def test_answers_that_are_no_objects_have_no_schema():
    assert read_objects(['{"a":1}', "plain words"]) is None
    assert read_objects(['{"a":1}', "[1]"]) is None
    assert read_objects([]) is None
    assert read_objects([json.dumps(a) for a in ANSWERS]) == ANSWERS
