import json
from pathlib import Path

import pytest

from stages import curate
from stages.common.errors import InputError
from stages.common.personal_data import PERSONAL_DATA
from stages.common.records import Message, make_row, read_rows, write_rows
from stages.common.task.json_task import JsonTask
from stages.common.task.text_task import TextTask
from stages.curate import (
    apply_rules,
    check_answer,
    count_rows,
    find_conflicting_answers,
    find_contradicting_feedback,
    find_exact_duplicates,
    find_near_duplicates,
    find_non_text,
    find_personal_data,
    find_repetition,
    limit_answer_length,
    limit_question_length,
    normalize_row,
    normalize_text,
    plot_rows,
)
from tests.stages.common.test_personal_data import PERSONAL

ROOT = Path(__file__).parents[2]


def row(question="turn on the light", answer='{"intent":"On"}', **more):
    return make_row([Message("user", question), Message("assistant", answer)], "toy", "mit", **more)


def reason(rule, **parts):
    rejection = rule(row(**parts))
    return rejection.reason if rejection else None


@pytest.mark.parametrize(
    ("text", "one_spelling"),
    [
        ("cafe\u0301", "café"),
        ("  turn   on\tnow  ", "turn on now"),
        ("a\u00a0b\u3000c", "a b c"),
        ("a\x00b\x1bc", "abc"),
        ("\ufeffhello", "hello"),
        ("one\r\ntwo\rthree", "one\ntwo\nthree"),
        ("def f():  \n    return  1\n", "def f():\n    return  1"),
        ("👩‍🚀 ok", "👩‍🚀 ok"),
    ],
)
def test_one_text_has_one_spelling(text, one_spelling):
    assert normalize_text(text) == one_spelling
    assert normalize_text(one_spelling) == one_spelling


def test_normalising_keeps_what_a_row_knows_and_gives_it_the_id_of_its_new_text():
    before = row("cafe\u0301 ", group="g", tags={"a": "b"}, origin="feedback")
    after = normalize_row(before)
    assert after == row("café", group="g", tags={"a": "b"}, origin="feedback")
    assert normalize_row(row("cafe\u0301")).group == row("café").id


def test_a_message_of_control_characters_only_is_dropped_and_not_lost():
    assert normalize_row(row("\x00")) == row("\x00")
    kept, rejected = apply_rules([normalize_row(row("\x00\x01"))], [limit_question_length(1, 10)], [])
    assert (kept, [rejection.reason for _, rejection in rejected]) == ([], ["empty_question"])


def test_questions_and_answers_have_a_length():
    assert reason(limit_question_length(3, 5), question="ab") == "short_question"
    assert reason(limit_question_length(3, 5), question="abcdef") == "long_question"
    assert reason(limit_question_length(3, 5), question="abcd") is None
    assert reason(limit_answer_length(5), answer="abcdef") == "long_answer"
    assert reason(limit_answer_length(5), answer="abc") is None


@pytest.mark.parametrize("answer", ["on", '{"a":', "4", '"a"', "null"])
def test_an_answer_that_is_no_json_object_goes(answer):
    assert reason(check_answer(JsonTask(None)), answer=answer) == "invalid_answer"
    assert reason(check_answer(JsonTask(None)), answer='{"a": [1]}') is None


def test_what_is_said_over_and_over_goes():
    assert reason(find_repetition, question="a" * 40) == "repetition"
    assert reason(find_repetition, answer="yes " * 12) == "repetition"
    assert reason(find_repetition, question="=" * 20 + " a title " + "=" * 20) is None
    assert reason(find_repetition, question="no no no, I said no") is None


def test_questions_of_signs_go():
    assert reason(find_non_text, question="!!!??? ### $$$ %%% &&&") == "mostly_not_text"
    assert reason(find_non_text, question=":-)") is None
    assert reason(find_non_text, question="今日の天気はどうですか、教えてください") is None
    assert reason(find_non_text, question="12 + 30 * (4 - 5) = ?") is None


@pytest.mark.parametrize("kind", PERSONAL_DATA)
def test_personal_data_goes_by_its_kind_wherever_it_stands(kind):
    text, others = PERSONAL[kind][0], [other for other in PERSONAL_DATA if other != kind]
    assert reason(find_personal_data([kind]), question=text) == f"personal_{kind}"
    assert reason(find_personal_data([kind]), answer=text) == f"personal_{kind}"
    assert reason(find_personal_data(others), question=text) is None


def test_the_reason_does_not_repeat_the_personal_data():
    rejection = find_personal_data(["email"])(row("write to ann@example.org"))
    assert "ann" not in rejection.detail


def test_both_rows_of_a_conflict_go_and_the_order_of_keys_is_no_conflict():
    rows = [
        row("a b", '{"x":1}'),
        row("A  b", '{"x":2}'),
        row("c", '{"x":1,"y":2}'),
        row("c", '{"y":2, "x":1}'),
    ]
    assert {
        number: rejection.reason
        for number, rejection in find_conflicting_answers(JsonTask(None))(rows).items()
    } == {
        0: "conflicting_answer",
        1: "conflicting_answer",
    }


def test_feedback_that_contradicts_other_rows_goes_and_they_stay():
    rows = [
        row(),
        row("Turn on  the light", '{"intent":"Off"}', origin="feedback"),
        row("turn on the light", '{ "intent": "On" }', origin="feedback"),
        row("something new", '{"intent":"Off"}', origin="feedback"),
    ]
    assert list(find_contradicting_feedback(JsonTask(None))(rows)) == [1]
    assert find_conflicting_answers(JsonTask(None))([rows[0], rows[2], rows[3]]) == {}


def test_all_but_the_first_of_equal_rows_go():
    rows = [row("a"), row("b"), row("a"), row("a")]
    assert sorted(find_exact_duplicates(rows)) == [2, 3]


def test_near_duplicates_go_when_the_answer_is_the_same():
    rows = [
        row("turn on the light in the kitchen"),
        row("turn on the lights in the kitchen"),
        row("turn on the light in the kitchen!", '{"intent":"Off"}'),
    ]
    rejected = find_near_duplicates(0.8, TextTask())(rows)
    assert sorted(rejected) == [1]
    assert rows[0].id in rejected[1].detail


def test_a_chain_of_near_duplicates_is_measured_against_kept_rows_only():
    texts = ["turn on the light", "turn on the lights", "turn on the lights!!", "turn on the lights!! now"]
    kept, rejected = apply_rules([row(text) for text in texts], [], [find_near_duplicates(0.8, TextTask())])
    assert texts.index(kept[1].question) > 1
    assert len(kept) + len(rejected) == 4


def test_a_row_has_the_reason_of_the_first_rule_and_nothing_is_lost():
    rows = [row("x", "no json"), row("fine"), row("fine"), row("write to ann@example.org", "no json")]
    kept, rejected = apply_rules(
        rows, [limit_question_length(2, 99), check_answer(JsonTask(None))], [find_exact_duplicates]
    )
    assert kept == [row("fine")]
    assert [(r.question, d.reason) for r, d in rejected] == [
        ("x", "short_question"),
        ("fine", "exact_duplicate"),
        ("write to ann@example.org", "invalid_answer"),
    ]
    assert count_rows(4, kept, rejected)["rejected_by_reason"] == {
        "invalid_answer": 1,
        "exact_duplicate": 1,
        "short_question": 1,
    }


def test_counts_that_do_not_add_up_are_refused():
    with pytest.raises(AssertionError, match="3 rows went in"):
        count_rows(3, [row()], [])


def test_equal_numbers_are_equal_plots(tmp_path):
    counts = {"near_duplicate": 3, "short_question": 1}
    plot_rows(10, counts, tmp_path / "a.svg")
    plot_rows(10, dict(reversed(counts.items())), tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert b"near_duplicate" in (tmp_path / "a.svg").read_bytes()


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())


def test_rejects_are_written_with_their_rows(project):
    write_rows(
        Path("artifacts/collect/rows.parquet"),
        [row("one light on"), row("one light on"), row("call a@b.org")],
    )
    curate.main()
    assert read_rows(Path("artifacts/curate/rows.parquet")) == [row("one light on")]
    rejects = [json.loads(line) for line in Path("artifacts/curate/rejects.jsonl").read_text().splitlines()]
    assert [reject["reason"] for reject in rejects] == ["exact_duplicate", "personal_email"]
    assert rejects[1]["row"]["messages"][0]["content"] == "call a@b.org"
    assert rejects[1]["id"] == rejects[1]["row"]["id"]
    report = json.loads(Path("reports/curate/metrics.json").read_text())
    assert (report["rows_in"], report["kept"], report["rejected"]) == (3, 1, 2)
    assert Path("reports/curate/rows.svg").read_bytes().startswith(b"<?xml")


def test_no_row_goes_because_of_feedback_wherever_its_source_stands(project):
    own = [
        row("please turn on everything that shines in the long hall upstairs by the light"),
        row("what time is it"),
        row("twice"),
        row("twice"),
    ]
    told = [
        row(
            "please turn on everything that shines in the long hall upstairs by the light",
            '{"intent":"Off"}',
            origin="feedback",
        ),
        row(
            "please turn on everything that shines in the long hall upstairs by the lights", origin="feedback"
        ),
        row("what time is it", origin="feedback"),
        row("a thing nobody had said", origin="feedback"),
    ]
    for order in ([own[0], *told, *own[1:]], [*own, *told]):
        write_rows(Path("artifacts/collect/rows.parquet"), order)
        curate.main()
        kept = read_rows(Path("artifacts/curate/rows.parquet"))
        assert kept == [*own[:3], told[3]]
        reasons = json.loads(Path("reports/curate/metrics.json").read_text())["rejected_by_reason"]
        assert reasons == {"contradicting_feedback": 1, "exact_duplicate": 2, "near_duplicate": 1}


def test_when_no_row_is_left_the_reasons_are_named_and_written(project):
    write_rows(Path("artifacts/collect/rows.parquet"), [row(answer="no json")])
    with pytest.raises(InputError, match=r"all 1 rows were rejected.*invalid_answer"):
        curate.main()
    assert "invalid_answer" in Path("artifacts/curate/rejects.jsonl").read_text()


def test_curating_before_collecting_says_what_to_run(project):
    with pytest.raises(InputError, match="dvc repro collect"):
        curate.main()
