import json

import pytest

from stages.common.errors import InputError
from stages.common.task.json_task import JsonTask
from stages.common.task.kinds import make_task, resolve_task
from stages.common.task.label_task import LabelTask
from stages.common.task.settings import TaskSettings
from stages.common.task.text_task import ChatTask, TextTask
from stages.common.task.tools_task import ToolsTask

TASKS = [
    *(JsonTask("intent"), JsonTask(None), LabelTask(("a", "b")), ToolsTask()),
    *(TextTask(), TextTask("exact_match"), ChatTask(), ChatTask("exact_match")),
]
RIGHT = {
    "json": '{"intent": "a", "n": 1}',
    "label": "a",
    "text": "any words",
    "chat": "any words",
    "tools": '{"tool_calls":[{"name":"a","arguments":{"n":1}}]}',
}
WRONG = {
    "json": '{"intent": "b", "n": 1}',
    "label": "b",
    "text": "other words",
    "chat": "other words",
    "tools": '{"tool_calls":[{"name":"b","arguments":{"n":1}}]}',
}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.kind}-{task.class_name}-{task.primary}")
class TestEveryKind:
    def test_is_read_again_from_what_it_describes(self, task):
        assert make_task(json.loads(json.dumps(task.describe()))) == task

    def test_has_a_meaning_for_each_metric_and_decides_by_the_first(self, task):
        metrics = task.score([RIGHT[task.kind], "?"], [RIGHT[task.kind]] * 2)
        assert set(metrics) <= set(task.meanings)
        assert next(iter(task.meanings)) == task.primary
        assert metrics[task.primary].scale

    def test_names_what_is_wrong_with_an_answer(self, task):
        right, wrong = RIGHT[task.kind], WRONG[task.kind]
        assert task.find_errors(right, right) == {}
        for answer in (wrong, ""):
            found = task.find_errors(answer, right)
            assert found and set(found) <= set(task.error_types)
            assert not task.is_right(answer, right)

    def test_learns_its_own_answers_and_no_empty_one(self, task):
        assert task.find_problem(RIGHT[task.kind]) is None
        assert task.find_problem(" ") is not None

    def test_has_a_schema_that_its_answers_fit(self, task):
        answers = [RIGHT[task.kind], WRONG[task.kind]]
        schema = task.derive_schema(answers)
        assert all(task.fits(schema, answer) for answer in answers)

    def test_rewrites_an_answer_to_one_that_means_the_same(self, task):
        answer = f" {RIGHT[task.kind]}\n"
        written = task.rewrite(answer, task.derive_schema([RIGHT[task.kind]]), (",", ":"))
        assert written == written.strip()
        assert task.is_right(written, answer)


def test_kinds_with_the_same_settings_are_not_equal():
    assert TextTask() != ChatTask() and make_task({"kind": "chat"}) == ChatTask()


@pytest.mark.parametrize("task", [TextTask(), ChatTask()], ids=lambda task: task.kind)
@pytest.mark.parametrize("answer", [RIGHT["tools"], '{"malformed_call":"x"}'])
def test_a_call_is_no_text_to_learn(task, answer):
    assert "task.kind: tools" in task.find_problem(answer)


@pytest.mark.parametrize(
    ("task", "answer", "has_one"),
    [
        (JsonTask(None), "{}", True),
        (LabelTask(("a", "b")), "a", True),
        (TextTask(), "a", False),
        (ToolsTask(), RIGHT["tools"], True),
        (ToolsTask(), "Which room?", False),
    ],
)
def test_another_text_may_be_as_right_but_not_another_call(task, answer, has_one):
    assert task.has_one_answer(answer) is has_one


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ('{"intent": 0}', "must be text"),
        ('{"intent": ""}', "must be text"),
        ('{"area": "x"}', "no key 'intent'"),
        ('{"intent": "a", "n": NaN}', "not one JSON value"),
        ('{"intent": "a", "n": Infinity}', "not one JSON value"),
        ('"a"', "not a JSON object"),
    ],
)
def test_json_that_could_not_be_evaluated_is_not_learned(answer, problem):
    assert problem in JsonTask("intent").find_problem(answer)


@pytest.mark.parametrize("label", ["under_$5_to_$10", "refund, late", "12", "ü"])
def test_a_label_may_have_commas_and_signs(label):
    assert LabelTask((label,)).find_problem(f"{label} ") is None


@pytest.mark.parametrize(("answer", "problem"), [("c", "not one of"), ("a\nb", "one line")])
def test_a_text_outside_the_set_is_not_a_label(answer, problem):
    assert problem in LabelTask(("a", "b")).find_problem(answer)


def test_the_set_of_labels_is_that_of_the_answers_unless_it_is_given():
    answers = ["b", "a ", "b", "a", "x\ny"]
    assert resolve_task(TaskSettings(kind="label"), answers) == LabelTask(("a", "b"))
    assert resolve_task(TaskSettings(kind="label", labels=("c", "a")), answers) == LabelTask(("a", "c"))


def test_answers_that_hardly_repeat_are_not_labels():
    with pytest.raises(InputError, match="4 different answers"):
        resolve_task(TaskSettings(kind="label"), ["a", "b", "c", "d", "a"])
