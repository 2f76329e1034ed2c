"""Rejected answers and ratings through curate: what is excluded, and what is kept apart."""

import json
from pathlib import Path

import pytest
import yaml

from stages.common.messages import Message
from stages.common.records import make_row, read_rows, write_rows
from stages.common.task.json_task import JsonTask
from stages.curate.__main__ import main
from stages.curate.rules import find_personal_data, require_difference

ROOT = Path(__file__).parents[3]
ON = '{"intent":"On"}'


def row(question="turn on the light", answer=ON, worse=None, **more):
    rejected = Message("assistant", worse) if worse is not None else None
    return make_row(
        [Message("user", question), Message("assistant", answer)], "toy", "mit", rejected=rejected, **more
    )


@pytest.fixture
def curate(tmp_path, monkeypatch):
    """Return a function that curates rows, and returns those kept, those refused and the reasons."""
    monkeypatch.chdir(tmp_path)
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    Path("params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")

    def run(*rows):
        write_rows(Path("artifacts/collect/rows.parquet"), rows)
        main()
        folder = Path("artifacts/curate")
        report = json.loads(Path("reports/curate/metrics.json").read_text())
        return read_rows(folder / "rows.parquet"), read_rows(folder / "refused.parquet"), report

    return run


def test_two_answers_that_mean_the_same_are_no_pair():
    rule = require_difference(JsonTask("intent"))
    assert rule(row(worse='{ "intent": "On" }')).reason == "equal_answers"
    assert rule(row(worse="no JSON at all")) is None
    assert rule(row()) is None


def test_personal_data_in_the_worse_answer_is_found_and_is_in_no_file(curate):
    private = row("one question", worse="write to ann@perennial-mail.net")
    assert find_personal_data(["email"])(private).detail == "in the message of the assistant (rejected)"
    kept, _, report = curate(private, row("another question", worse="no"))
    assert [one.question for one in kept] == ["another question"]
    assert report["rejected_by_reason"] == {"personal_email": 1}
    assert "ann@perennial-mail.net" not in Path("artifacts/curate/rejects.jsonl").read_text()


def test_pairs_are_spelled_compared_and_counted_with_their_worse_answer(curate):
    same = row("play the radio", worse="one")
    kept, refused, report = curate(
        row("cafe\u0301", worse="no\r\n"),
        same,
        same,
        row("play the radio", worse="two"),  # another comparison, not a copy
        row("equal answers here", worse=ON),
        row("too long an answer", worse="x" * 5000),
        row("without"),
    )
    assert [(one.question, one.rejected and one.rejected.content) for one in kept] == [
        ("café", "no\n"),
        ("play the radio", "one"),
        ("play the radio", "two"),
        ("without", None),
    ]
    assert (report["with_rejected_answer"], report["refused_answers"], len(refused)) == (3, 0, 0)
    assert report["rejected_by_reason"] == {"equal_answers": 1, "exact_duplicate": 1, "long_answer": 1}


def test_a_refused_answer_is_kept_apart_and_neither_checked_as_a_right_one_nor_counted_as_one(curate):
    bad = row("dim the lamp", "not even JSON", is_desirable=False)
    kept, refused, report = curate(
        row("turn on the light"),
        bad,
        bad,
        row("turn on the light", is_desirable=False),  # others found this answer right
        row("x", "no", is_desirable=False),
        row("close the blind", '{"intent":"Close"}', is_desirable=True),
    )
    assert [one.question for one in kept] == ["turn on the light", "close the blind"]
    assert refused == [bad]
    assert (report["rows_in"], report["kept"], report["refused_answers"]) == (6, 2, 1)
    assert report["rejected_by_reason"] == {
        "contradicting_rating": 1,
        "exact_duplicate": 1,
        "short_question": 1,
    }
