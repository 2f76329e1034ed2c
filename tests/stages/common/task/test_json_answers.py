import json

import pytest

from stages.common.task.json_answers import find_json_errors, read_json_answer, score_json
from stages.common.task.json_task import JsonTask


def read(*texts):
    return [read_json_answer(text) for text in texts]


def value(metric):
    return metric.value()


REFERENCE = '{"intent":"HassTurnOn","area":"kitchen","brightness":5}'


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (REFERENCE, True),
        ('{"area": "kitchen", "brightness": 5.0, "intent": "HassTurnOn"}\n', True),
        ('{"area":"kitchen","brightness":5e0,"intent":"HassTurnOn"}', True),
        ('{"intent":"HassTurnOn","area":"Kitchen","brightness":5}', False),
        ('{"intent":"HassTurnOn","area":"kitchen","brightness":"5"}', False),
        ('{"intent":"HassTurnOn","area":"kitchen"}', False),
        ('{"intent":"HassTurnOn","area":"kitchen","brightness":5,"name":null}', False),
    ],
)
def test_exact_match_overlooks_the_order_of_keys_and_the_spelling_of_numbers(answer, right):
    assert value(score_json(read(answer), read(REFERENCE), "intent")["exact_match"]) == float(right)


def test_true_is_not_one():
    assert value(score_json(read('{"a":true}'), read('{"a":1}'), None)["exact_match"]) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sure! " + REFERENCE,
        f"```json\n{REFERENCE}\n```",
        REFERENCE + REFERENCE,
        REFERENCE[:-1],
        '{"intent":"a","intent":"b"}',
        '{"intent":NaN}',
        '{"intent":1e999}',
        '{"intent":"\\ud800"}',
        "[" * 100_000,
        '{"n":' + "9" * 5000 + "}",
    ],
)
def test_what_is_not_one_json_value_is_no_answer(text):
    assert read_json_answer(text) is None


@pytest.mark.parametrize(
    ("answer", "valid"),
    [('{"intent":"x"}', True), ('{"intent":1}', False), ('{"area":"x"}', False), ('"HassTurnOn"', False)],
)
def test_a_valid_answer_has_a_string_under_the_label_key(answer, valid):
    assert value(score_json(read(answer), read(REFERENCE), "intent")["valid_output"]) == float(valid)


def test_without_a_label_key_an_answer_of_the_references_kind_is_valid():
    metrics = score_json(read("[1]", "{}", "3"), read("[2]", "[2]", "[2]"), None)
    assert value(metrics["valid_output"]) == pytest.approx(1 / 3)
    assert set(metrics) == {"exact_match", "valid_output"}


def test_label_accuracy_looks_at_the_label_alone():
    answers = read(
        '{"intent":"HassTurnOn"}', '{"intent":"HassTurnOff","area":"kitchen","brightness":5}', "no"
    )
    metrics = score_json(answers, read(*[REFERENCE] * 3), "intent")
    assert value(metrics["intent_accuracy"]) == pytest.approx(1 / 3)


def test_slot_f1_counts_pairs_over_all_rows():
    # Row 1: area right, brightness wrong, name too much. Row 2: invalid, so both pairs are missed.
    answers = read('{"intent":"X","area":"kitchen","brightness":6,"name":"lamp"}', "lamp on")
    metrics = score_json(answers, read(REFERENCE, REFERENCE), "intent")
    precision, recall = 1 / 3, 1 / 4
    assert value(metrics["slot_f1"]) == pytest.approx(2 * precision * recall / (precision + recall))


def test_without_a_label_key_every_pair_is_a_slot():
    metrics = score_json(read('{"intent":"HassTurnOn"}'), read(REFERENCE), None)
    assert value(metrics["slot_f1"]) == pytest.approx(2 * 1 / (1 + 3))


def test_no_slot_to_find_and_none_invented_is_right():
    assert value(score_json(read('{"intent":"a"}'), read('{"intent":"b"}'), "intent")["slot_f1"]) == 1.0


@pytest.mark.parametrize(
    ("answer", "kinds"),
    [
        (REFERENCE, []),
        ("lamp", ["invalid"]),
        ('{"area":"kitchen"}', ["invalid"]),
        ('{"intent":"HassTurnOff","area":"kitchen","brightness":5}', ["wrong label"]),
        (
            '{"intent":"HassTurnOn","area":"attic","name":"lamp"}',
            ["missing slot", "wrong value", "extra slot"],
        ),
    ],
)
def test_errors_are_named(answer, kinds):
    assert list(find_json_errors(read_json_answer(answer), read_json_answer(REFERENCE), "intent")) == kinds


def test_an_error_shows_what_was_given_and_what_was_wanted():
    errors = find_json_errors(
        read_json_answer('{"intent":"HassTurnOn","area":"attic","brightness":5}'),
        read_json_answer(REFERENCE),
        "intent",
    )
    assert errors == {"wrong value": 'area="attic", not "kitchen"'}


def test_the_canonical_form_reads_back_as_the_same_value():
    answer = read_json_answer(REFERENCE)
    assert json.loads(answer.canonical) == answer.value


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ('{"label":"on","n":1}', None),
        ('{"label":0}', "the class under 'label' is 0; it must be text"),
        ('{"label":null}', "the class under 'label' is null"),
        ('{"label":""}', "must be text that is not empty"),
        ('{"n":1}', "no key 'label'"),
        ('{"label":"on","n":NaN}', "not one JSON value"),
        ('{"label":"on","label":"off"}', "not one JSON value"),
    ],
)
def test_an_answer_that_could_not_be_judged_is_no_answer_to_learn(answer, problem):
    found = JsonTask("label").find_problem(answer)
    assert (found is None) if problem is None else (problem in found)
