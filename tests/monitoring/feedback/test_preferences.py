"""Corrections as pairs, and thumbs down as refused answers: what becomes a row, and what does not."""

import json

import pytest

from monitoring.feedback.rows import ROWS, format_report, read_labelled, write_labelled
from stages.common.sources.feedback import collect_feedback
from tests.monitoring.feedback.test_feedback import OFF, ON, SETTINGS, TEXT, Events

REFUSALS = SETTINGS.model_copy(update={"thumbs_down_as_refusal": True, "holdout_share": 0.000001})


@pytest.fixture
def events(tmp_path):
    return Events(tmp_path)


def rejected(labelled):
    rows = (*labelled.train, *labelled.holdout)
    return {row.question: row.rejected and row.rejected.content for row in rows}


def test_the_answer_that_a_correction_replaces_is_the_worse_one_of_a_pair(events):
    events.add_exchange("pair", correction=OFF, answer=ON)
    events.add_exchange("invalid before", correction=OFF, answer="no JSON")
    events.add_exchange("confirmed", thumb=1, answer=ON)
    assert rejected(events.rows()) == {"pair": ON, "invalid before": "no JSON", "confirmed": None}


@pytest.mark.parametrize(
    "changes",
    [
        {"answer": '{ "intent":"Off" }'},  # it means the same
        {"answer": None, "status": 503},
        {"answer": '{"intent":"On","ar', "finish_reason": "length"},
        {"answer": '{"intent":"On","area":"[email]"}'},
        {"answer": '{"intent":"On","area":"ann@perennial-mail.net"}'},
        {"answer": '{"intent":"On","area":"' + "x" * 300 + '"}'},
        {"answer": '{"malformed_call":"<tool_call>{"}'},
        {"answer": "  "},
    ],
)
def test_an_answer_that_is_of_no_use_leaves_the_correction_as_it_is(events, changes):
    events.add_exchange("a", correction=OFF, **changes)
    assert rejected(events.rows()) == {"a": None}


def test_a_thumb_down_is_a_refused_answer_only_where_the_settings_say_so(events):
    events.add_exchange("a", thumb=-1, answer="no JSON")
    events.add_exchange("b", thumb=1)
    events.store()
    assert events.rows(SETTINGS).refused == []
    labelled = events.rows(REFUSALS)
    (row,) = labelled.refused
    assert (row.question, row.answer, row.is_desirable) == ("a", "no JSON", False)
    assert row.tags == {"feedback": "refusal"}
    assert [one.question for one in labelled.train] == ["b"]
    report = labelled.report
    assert (report["labelled_rows"], report["rows_refused"]) == (1, 1)
    assert "1 refused answers are learned from by `finetune.method: kto` only" in format_report(report)


def test_refused_answers_do_not_outvote_each_other_and_are_dropped_where_others_found_them_right(events):
    events.add_exchange("a", thumb=-1, answer=ON, user="ann")
    events.add_exchange("a", thumb=-1, answer="no JSON", user="bob")
    events.add_exchange("b", thumb=-1, answer=ON, user="ann")
    events.add_exchange("b", thumb=1, answer=ON, user="bob")
    events.add_exchange("cut off", thumb=-1, answer='{"inte', finish_reason="length")
    labelled = events.rows(REFUSALS)
    assert [(row.question, row.answer) for row in labelled.refused] == [("a", "no JSON")]
    assert [row.question for row in labelled.train] == ["b"]
    assert labelled.report["excluded"] == {"confirmed": 1, "unfinished": 1, "duplicate": 1}


def test_a_refused_answer_to_a_question_that_is_held_out_is_not_learned(events):
    for number in range(40):
        events.add_exchange(f"question {number}", thumb=-1)
    labelled = events.rows(REFUSALS.model_copy(update={"holdout_share": 0.5}))
    assert 5 < len(labelled.refused) < 35 and not labelled.holdout
    assert labelled.report["excluded"] == {"held_out": 40 - len(labelled.refused)}


def test_pairs_and_refused_answers_come_back_from_the_file_with_their_ids(events, tmp_path):
    events.add_exchange("pair", correction=OFF, answer=ON)
    events.add_exchange("plain", thumb=1)
    events.add_exchange("bad", thumb=-1, answer="no JSON")
    labelled = events.rows(REFUSALS)
    write_labelled(tmp_path, labelled)
    rows = [*labelled.train, *labelled.refused]
    assert read_labelled(tmp_path / ROWS) == rows
    collected = collect_feedback(tmp_path / ROWS, None, "stop").rows
    assert [row.id for row in collected] == [row.id for row in rows]
    assert [(row.rejected, row.is_desirable) for row in collected] == [
        (row.rejected, row.is_desirable) for row in rows
    ]
    lines = [json.loads(line) for line in (tmp_path / ROWS).read_text().splitlines()]
    assert [set(line) & {"rejected", "is_desirable"} for line in lines if "plain" in str(line)] == [set()]


def test_a_text_answer_is_refused_as_it_was_served(events):
    events.add_exchange("a", thumb=-1, answer="I do not know.")
    (row,) = events.rows(REFUSALS, TEXT).refused
    assert row.answer == "I do not know."
