from dataclasses import replace

import pytest

from monitoring.verdicts import (
    ColumnChange,
    DriftTypeVerdict,
    DriftVerdict,
    Period,
    TriggerDecision,
    get_window_folder,
    main,
    read_verdict,
    read_verdicts,
    write_verdict,
)
from stages.common.errors import InputError

GERMAN = ColumnChange(
    column="language",
    kind="category",
    effect=0.11,
    p_value=0.0005,
    inflation=1.0,
    drifted=True,
    before="de 0 %",
    after="de 11 %",
    summary="language: de 0 % -> 11 % of 500 questions",
)
DRIFTED = DriftVerdict(
    id="20261121T101500-500",
    model="home",
    version="0123456789ab",
    made_at=1_800_000_900.0,
    window=Period(1_800_000_000.0, 1_800_000_800.0, 500, 98),
    reference=Period(1_799_990_000.0, 1_799_999_000.0, 2000, 401),
    judged=True,
    why_not=None,
    drifted=True,
    drift_types=(
        DriftTypeVerdict("input", True, 0.0005, (GERMAN,)),
        DriftTypeVerdict("output", False, 0.4, (replace(GERMAN, column="answer_form", drifted=False),)),
    ),
    quarantined={"no user message": 3},
    late_rows=2,
    alpha=0.005,
    service={"total_p95_s": 1.25, "cost_per_1000": None},
    trigger=TriggerDecision(False, "1 of the last 3", ("23 more labelled rows",)),
)
QUIET = replace(
    DRIFTED,
    id="20261121T090000-500",
    window=Period(1_799_999_000.0, 1_800_000_000.0, 500, 98),
    drifted=False,
    drift_types=(),
)


def test_a_verdict_comes_back_as_it_was_written(tmp_path):
    write_verdict(tmp_path, DRIFTED)
    assert read_verdict(tmp_path, DRIFTED.id) == DRIFTED
    assert DRIFTED.tag == "home:0123456789ab"


def test_verdicts_come_oldest_window_first(tmp_path):
    for verdict in (DRIFTED, QUIET):
        write_verdict(tmp_path, verdict)
    assert read_verdicts(tmp_path) == [QUIET, DRIFTED]


def test_where_nothing_was_watched_there_is_no_verdict(tmp_path):
    assert read_verdicts(tmp_path) == []


@pytest.mark.parametrize("text", ["{", "[]", '{"id": "w"}', '{"id": 1, "judged": "perhaps"}'])
def test_a_broken_file_is_named(tmp_path, text):
    write_verdict(tmp_path, QUIET)
    path = get_window_folder(tmp_path, "broken") / "verdict.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(InputError, match=r"broken/verdict\.json"):
        read_verdicts(tmp_path)


@pytest.mark.parametrize("name", ["nothing", "../../etc", ""])
def test_a_window_without_a_verdict_is_an_error_that_says_how_to_list_them(tmp_path, name):
    with pytest.raises(InputError, match="perennial verdicts list"):
        read_verdict(tmp_path, name)


def test_the_list_has_one_line_a_window_with_what_changed(tmp_path, monkeypatch, capsys):
    for verdict in (DRIFTED, QUIET, replace(QUIET, id="few", judged=False, why_not="20 rows")):
        write_verdict(tmp_path, verdict)
    monkeypatch.chdir(tmp_path)
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[1].endswith("no drift")
    assert lines[2].endswith("not judged: 20 rows")
    assert lines[3].endswith("drift of input: language: de 0 % -> 11 % of 500 questions")


def test_an_analyst_reads_columns_reasons_and_what_is_missing(tmp_path, monkeypatch, capsys):
    write_verdict(tmp_path, DRIFTED)
    monkeypatch.chdir(tmp_path)
    assert main(["show", DRIFTED.id]) == 0
    text = capsys.readouterr().out
    for part in (
        "de 0 %",
        "de 11 %",
        "0.110",
        "0.0005",
        "23 more labelled rows",
        "3: no user message",
        "1.25",
    ):
        assert part in text
    assert "input: drifted" in text and "output: no drift" in text


def test_a_wrong_name_on_the_command_line_is_an_error_and_no_trace(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["show", "nothing"]) == 1
    assert "  fix: " in capsys.readouterr().err
