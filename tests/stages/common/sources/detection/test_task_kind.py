import json
import tracemalloc

import pytest

from stages.common.errors import InputError
from stages.common.sources.detection.task_kind import detect_task_kind


def kind_of(answers, **options):
    found = detect_task_kind(answers, **options)
    return found.kind, found.label_key


def calls(number, **more):
    return [json.dumps({"intent": f"i{n % 4}", "slot": n, **more}) for n in range(number)]


def test_json_answers_with_a_key_of_classes_are_a_json_task():
    assert kind_of(calls(40)) == ("json", "intent")


def test_a_broken_json_answer_does_not_change_the_kind():
    assert kind_of([*calls(99), '{"intent"']) == ("json", "intent")


def test_json_answers_without_classes_have_no_label_key():
    assert kind_of([json.dumps({"total": n, "items": [n]}) for n in range(40)]) == ("json", None)


def test_two_keys_that_could_name_the_class_are_named_and_none_is_taken():
    answers = [json.dumps({"colour": f"c{n % 3}", "size": f"s{n % 2}"}) for n in range(40)]
    found = detect_task_kind(answers)
    assert (found.kind, found.label_key) == ("json", None)
    assert "colour, size could name the class: choose with --label-key" in found.reason
    assert kind_of(answers, label_key="size") == ("json", "size")


def test_a_usual_name_goes_before_other_keys_with_classes():
    assert kind_of(calls(40, area="hall")) == ("json", "intent")


def test_a_label_key_that_no_answer_has_is_refused_with_the_keys_there():
    with pytest.raises(InputError, match="under 'intnet'") as error:
        detect_task_kind(calls(40), label_key="intnet")
    assert "intent, slot" in str(error.value)


def test_few_short_answers_are_labels():
    assert kind_of([f"class {n % 20}" for n in range(60)]) == ("label", None)
    assert kind_of([str(n % 2) for n in range(60)]) == ("label", None)


def test_answers_that_rarely_repeat_are_text():
    assert kind_of([f"ls -{n}" for n in range(60)]) == ("text", None)


def test_long_answers_are_text_however_often_they_repeat():
    assert kind_of(
        [f"You can reset your password on the page of your account, step {n % 5}. " * 2 for n in range(60)]
    )[0] == ("text")


def test_a_last_answer_decides_as_well_as_a_first():
    labels = [f"class {n % 20}" for n in range(600)]
    assert kind_of(labels) == ("label", None)
    assert kind_of([*labels, "an answer of more than a line\n" * 2]) == ("text", None)
    assert kind_of([*calls(400), *(json.dumps({"intent": "x" * 100, "slot": 1}) for _ in range(9))]) == (
        "json",
        None,
    )


def test_answers_are_read_once_and_long_ones_are_not_kept():
    answers = (f"{n} " + chr(97 + n % 26) * 100_000 for n in range(300))
    tracemalloc.start()
    assert kind_of(answers) == ("text", None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000


def test_labels_with_few_rows_each_are_undecided_with_the_option_that_decides():
    with pytest.raises(InputError, match="labels with few rows each, or texts") as error:
        detect_task_kind([f"class {n % 30}" for n in range(60)])
    assert "--kind" in str(error.value)


def test_answers_of_which_half_are_json_are_undecided():
    with pytest.raises(InputError, match="30 of 60 answers are JSON"):
        detect_task_kind([*calls(30), *(f"text {n}" for n in range(30))])


def test_one_answer_for_all_rows_is_nothing_to_learn():
    with pytest.raises(InputError, match="all 9 rows have the same answer: 'yes'"):
        detect_task_kind(["yes"] * 9)
