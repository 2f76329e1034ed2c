import csv
import io

import pytest

from stages.common.messages import Message, ToolCall
from stages.common.records import make_row
from stages.common.task.json_task import JsonTask
from stages.common.task.text_task import TextTask
from stages.common.task.tools_task import ToolsTask
from stages.evaluate.error_analysis import (
    Prediction,
    format_errors_csv,
    format_errors_page,
    list_errors,
)

TASK = JsonTask("intent")

REFERENCE = '{"intent":"On","area":"attic"}'


def rows(n, answer=REFERENCE):
    return [
        make_row([Message("user", f"q{i}"), Message("assistant", answer)], "toy", "mit") for i in range(n)
    ]


def predictions(*texts, right=False, loss=1.0):
    return [Prediction(text, right, loss) for text in texts]


def test_errors_are_ranked_by_how_bad_they_are():
    texts = [
        '{"intent":"On","area":"attic","x":1}',
        "no idea",
        '{"intent":"Off","area":"attic"}',
        '{"intent":"On"}',
    ]
    found = list_errors(rows(4), predictions(*[""] * 4), predictions(*texts), TASK)
    assert [m.error_type for m in found] == ["invalid", "wrong label", "missing slot", "extra slot"]


def test_of_equal_errors_the_least_likely_right_answer_comes_first():
    sure, unsure = Prediction("?", False, 1.0), Prediction("?", False, 9.0)
    found = list_errors(rows(2), predictions("", ""), [sure, unsure], TASK)
    assert [m.question for m in found] == ["q1", "q0"]


def test_right_answers_are_no_list_errors():
    assert list_errors(rows(1), predictions(""), predictions(REFERENCE, right=True), TASK) == []


def test_an_answer_that_the_base_model_had_right_is_marked():
    found = list_errors(rows(1), predictions(REFERENCE, right=True), predictions("no"), TASK)
    assert found[0].base_was_right


def test_texts_are_ranked_by_how_far_off_they_are():
    found = list_errors(
        rows(2, "the lamp is on"), predictions("", ""), predictions("the lamp is off", "a fish"), TextTask()
    )
    assert [m.tuned for m in found] == ["a fish", "the lamp is off"]
    assert found[0].differs == "other text: chrF 10"


def test_the_page_shows_no_more_than_asked_for():
    found = list_errors(rows(5), predictions(*[""] * 5), predictions(*["no"] * 5), TASK)
    page = format_errors_page(found, 9, [], shown=2, task=TASK)
    assert "5 of 9" in page
    assert "The 2 worst answers" in page
    assert page.count("`no`") == 2


def test_neither_page_nor_table_runs_what_users_wrote():
    hostile = '=HYPERLINK("http://evil.example","ok")'
    tag = "<script>x</script> | [a](javascript:x) `"
    found = list_errors(rows(1, tag), predictions(hostile), predictions("\t@SUM(1)"), TextTask())
    (row,) = csv.DictReader(io.StringIO("".join(format_errors_csv(found))))
    assert (row["base"], row["tuned"], row["expected"]) == (f"'{hostile}", "'\t'@SUM(1)", tag)
    page = format_errors_page(found, 1, [(tag, hostile, 1)], shown=1, task=TextTask())
    render = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"linkify": False}).render
    html = render(page)
    assert "<script" not in html and "<a " not in html and "&lt;script&gt;" in html


def test_calls_are_shown_as_people_write_them_with_the_turn_and_what_the_tools_returned():
    call = ToolCall("get_state", '{"area":"attic","unit":"c"}')
    before = [
        Message("user", "how warm is it?"),
        Message("assistant", "", (call,)),
        Message("tool", '{"degrees": 20}'),
    ]
    asked = make_row(before[:2], "toy", "mit")
    told = make_row([*before, Message("assistant", "20 degrees.")], "toy", "mit", tags={"turn": "1"})
    given = Message("assistant", "One moment.", (ToolCall("get_state", '{"area":"hall"}'),)).answer
    found = list_errors([asked, told], predictions("", ""), predictions(given, "I do not know."), ToolsTask())
    assert [one.error_type for one in found] == ["missing argument", "other text"]
    lines = format_errors_page(found, 2, [], shown=2, task=ToolsTask()).splitlines()[-2:]
    assert lines[0] == (
        '| `how warm is it?` | `get_state(area="attic", unit="c")` | (nothing) '
        '| `One moment. get_state(area="hall")` '
        '| `missing argument: get_state.unit="c"; wrong value: get_state.area="hall", not "attic"` |'
    )
    assert lines[1].startswith('| turn 1: `how warm is it?` → `{"degrees": 20}` | `20 degrees.` |')
    (first, second) = csv.DictReader(io.StringIO("".join(format_errors_csv(found))))
    assert (first["turn"], first["result"], second["turn"]) == ("", "", "1")
    assert second["result"] == '{"degrees": 20}' and first["expected"] == asked.answer
