"""The curated rows against the suite: what passes, what stops the pipeline, and what people get to see."""

import json
import re
import shutil
import subprocess
import tracemalloc
from pathlib import Path

import pytest
import yaml

from stages.common.artifacts import read_json, write_json
from stages.common.errors import InputError, ParamsError
from stages.common.messages import Message, Tool, ToolCall
from stages.common.params.loading import load_params
from stages.common.records import make_row, write_rows
from stages.common.task.json_task import JsonTask
from stages.common.task.kinds import TASK_FILE
from stages.common.task.text_task import TextTask
from stages.common.task.tools_task import ToolsTask
from stages.validate.__main__ import main
from stages.validate.suite import (
    TEXTS,
    build_suite,
    build_table,
    find_read_texts,
    hash_no_table,
    list_expectations,
    read_results,
    run_suite,
)

TASK = JsonTask("intent")
ROOT = Path(__file__).parents[3]
SUBJECTS = ("rows", "ids", "provenance", "licenses", "texts", "answers", "labels")


def row(question, answer='{"intent":"TurnOn"}', license="apache-2.0", **more):
    messages = [Message("user", question), Message("assistant", answer)]
    return make_row(messages, source="test", license=license, **more)


def good_rows(count=20):
    labels = ("TurnOn", "TurnOff", "SetLevel")
    return [row(f"request number {n}", f'{{"intent":"{labels[n % 3]}"}}') for n in range(count)]


def outcomes(rows, own=(), task=TASK, **changes):
    """Run the suite over rows; by name."""
    limits = {
        "min_rows": 1,
        "max_rows": 1000,
        "allowed_licenses": ["apache-2.0"],
        "max_prompt_chars": 100,
        "max_answer_chars": 100,
        "min_labels": 1,
        "max_labels": None,
        "max_label_share": 1.0,
        "severity": dict.fromkeys(SUBJECTS, "critical"),
        "has_classes": task.class_name is not None,
    } | changes
    table = build_table(rows, task, find_read_texts(own))
    suite = build_suite([*list_expectations(**limits), *own], table.columns)
    return {outcome.name: outcome for outcome in read_results(run_suite(suite, table))}


def test_all_learned_answers_and_the_tools_of_a_conversation_are_looked_at():
    lamp = Tool(json.dumps({"type": "function", "function": {"name": "lamp", "description": "d" * 60}}))
    asks, broken = Message("assistant", "", (ToolCall("lamp", "{}"),)), '{"tool_calls": [{"function": "l"}]}'

    def talk(*answers, tools=(lamp,)):
        asked = (Message("user", "hi"), asks, Message("tool", "done"))
        turns = [turn for answer in answers for turn in (*asked, Message("assistant", answer))]
        return make_row(turns, "test", "apache-2.0", tools=tools)

    rows = [talk("on"), talk(broken, "off"), talk("x" * 90, "ok"), talk("on", tools=())]
    table = build_table(rows, ToolsTask(), learned_turns="all")
    assert list(table["answer_is_valid"]) == [True, False, True, True]
    assert table["answer_chars"][2] == 90
    assert table["prompt_chars"][0] == table["prompt_chars"][3] + len(lamp.text)
    found = build_table(rows, ToolsTask(), learned_turns="last")
    assert found["answer_is_valid"].all()
    assert list(found["answer_chars"]) == [2, 3, 2, 2]


def test_a_row_of_one_turn_is_measured_as_before():
    for rows, task in ((good_rows(), TASK), ([row("hi", "no json")], TASK)):
        last, every = (build_table(rows, task, learned_turns=turns) for turns in ("last", "all"))
        assert last.equals(every) and list(last["answer_chars"]) == [len(row.answer) for row in rows]
        assert list(last["prompt_chars"]) == [len(row.question) for row in rows]


def failed(found):
    return {name for name, outcome in found.items() if not outcome.success}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder with curated rows; the returned function sets keys of `validate` and the rows."""
    monkeypatch.chdir(tmp_path)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["validate"] |= {"min_rows": 1}

    def configure(rows, **section):
        write_rows(Path("artifacts/curate/rows.parquet"), rows)
        write_json(TASK_FILE, JsonTask("intent").describe())
        params["validate"].update(section)
        Path("params.yaml").write_text(yaml.safe_dump(params))

    return configure


def test_good_rows_meet_every_expectation():
    assert failed(outcomes(good_rows())) == set()


def test_too_few_and_too_many_rows_are_found():
    name = "ExpectTableRowCountToBeBetween"
    assert failed(outcomes(good_rows(5), min_rows=6)) == {name}
    assert failed(outcomes(good_rows(5), max_rows=4)) == {name}
    assert outcomes(good_rows(5), min_rows=6)[name].observed_value == 5


def test_an_empty_table_fails_by_its_number_of_rows():
    assert "ExpectTableRowCountToBeBetween" in failed(outcomes([]))


def test_a_repeated_id_is_found_with_both_its_rows():
    rows = [*good_rows(4), good_rows(4)[2]]
    found = outcomes(rows)["ExpectColumnValuesToBeUnique(id)"]
    assert (found.success, found.unexpected_count, found.positions) == (False, 2, (2, 4))


def test_a_licence_outside_the_list_is_found_and_case_does_not_matter():
    rows = [row("a", license="Apache-2.0"), row("b", license="cc-by-nc-4.0")]
    found = outcomes(rows)["ExpectColumnValuesToBeInSet(license)"]
    assert (found.success, found.positions) == (False, (1,))


def test_a_blank_question_and_a_long_answer_are_found():
    rows = [row("  "), row("fine", '{"intent":"' + "x" * 100 + '"}')]
    assert failed(outcomes(rows)) == {
        "ExpectColumnValuesToBeInSet(question_has_text)",
        "ExpectColumnValuesToBeBetween(answer_chars)",
    }


@pytest.mark.parametrize("answer", ["not json", '["a list"]', '"a string"', "{"])
def test_an_answer_that_is_no_json_object_is_found(answer):
    found = outcomes([row("a"), row("b", answer)])
    assert found["ExpectColumnValuesToBeInSet(answer_is_valid)"].positions == (1,)


def test_an_answer_without_the_label_is_found():
    found = outcomes([row("a"), row("b", '{"area":"kitchen"}')])
    assert failed(found) == {
        "ExpectColumnValuesToBeInSet(answer_is_valid)",
        "ExpectColumnValuesToNotBeNull(label)",
    }
    assert found["ExpectColumnValuesToNotBeNull(label)"].positions == (1,)


def test_too_few_and_too_many_labels_are_found():
    name = "ExpectColumnUniqueValueCountToBeBetween(label)"
    assert failed(outcomes(good_rows(), min_labels=4)) == {name}
    assert failed(outcomes(good_rows(), max_labels=2)) == {name}
    assert outcomes(good_rows(), min_labels=4)[name].observed_value == 3


def test_a_label_that_takes_too_much_is_found_by_its_rows():
    rows = [row(str(n)) for n in range(9)] + [row("other", '{"intent":"TurnOff"}')]
    found = outcomes(rows, max_label_share=0.8)["ExpectColumnValuesToBeBetween(label_share)"]
    assert (found.success, found.unexpected_count) == (False, 9)


def test_text_answers_need_no_label():
    assert failed(outcomes([row("a", "any words"), row("b", "more words")], task=TextTask())) == set()


def test_own_expectations_of_the_user_are_run_with_their_severity():
    own = [
        {
            "type": "ExpectColumnValuesToMatchRegex",
            "column": "question",
            "regex": "^[A-Z]",
            "severity": "warning",
        }
    ]
    found = outcomes([row("Upper"), row("lower")], own)["ExpectColumnValuesToMatchRegex(question)"]
    assert (found.success, found.severity, found.positions) == (False, "warning", (1,))


def test_tags_are_columns_that_an_expectation_can_name():
    rows = [row("a", tags={"platform": "phone"}), row("b", tags={"platform": "fridge"})]
    own = [
        {"type": "ExpectColumnValuesToBeInSet", "column": "tag_platform", "value_set": ("phone", "speaker")}
    ]
    assert outcomes(rows, own)["ExpectColumnValuesToBeInSet(tag_platform)"].positions == (1,)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            {"type": "ExpectColumnValuesToBeUniqe", "column": "id"},
            "did you mean ExpectColumnValuesToBeUnique",
        ),
        ({"type": "ExpectColumnValuesToBeUnique", "colum": "id"}, "did you mean column"),
        ({"type": "ExpectColumnValuesToBeUnique", "column": "qestion"}, "did you mean question"),
        ({"type": "ExpectColumnValuesToBeUnique", "column": "id", "severity": "bad"}, "severity"),
        ({"type": "ExpectColumnValueLengthsToBeBetween", "column": "id"}, "min_value and max_value"),
        ({"type": "get_context"}, "is not an expectation"),
        ({"column": "id"}, "is not an expectation"),
    ],
)
def test_an_unknown_expectation_is_an_error_and_never_passes(spec, words):
    with pytest.raises(ParamsError, match=re.escape(words)):
        build_suite([spec], ["id", "question"])


def test_all_wrong_expectations_are_in_one_message():
    wrong = [{"type": "ExpectNothing"}, {"type": "ExpectColumnValuesToBeUnique", "column": "nope"}]
    with pytest.raises(ParamsError, match=r"(?s)ExpectNothing.*'nope'"):
        build_suite(wrong, ["id"])


def test_a_misspelt_expectation_stops_before_any_work(project):
    project(good_rows(), expectations=[{"type": "ExpectColumnValuesToBeUniqe", "column": "id"}])
    with pytest.raises(ParamsError, match="did you mean ExpectColumnValuesToBeUnique"):
        load_params()


def test_an_expectation_that_cannot_be_computed_counts_as_failed():
    own = [{"type": "ExpectColumnValuesToBeBetween", "column": "question", "min_value": 1, "max_value": 2}]
    found = outcomes(good_rows(2), own)["ExpectColumnValuesToBeBetween(question)"]
    assert not found.success
    assert found.problem


def test_the_reports_of_good_rows_name_every_expectation_and_the_largest_label(project):
    project(good_rows())
    main()
    evidence = read_json(Path("reports/validate/metrics.json"))
    assert evidence["success"] is True
    assert evidence["rows"] == 20
    assert evidence["expectations_met"] == evidence["expectations_total"] == len(evidence["expectations"])
    assert evidence["labels"] == {"count": 3, "largest": "TurnOff", "largest_share": 0.35}
    assert read_json(Path("reports/validate/failures.json"))["failures"] == []


def test_a_failed_critical_expectation_shows_its_rows_after_the_reports_are_written(project):
    bad = [row(f"bad {n}", license="unknown") for n in range(5)]
    project([*good_rows(), *bad], max_shown_rows=2)
    with pytest.raises(InputError) as error:
        main()
    message = error.value.what
    assert "ExpectColumnValuesToBeInSet(license)" in message
    assert bad[0].id in message and "bad 1" in message and "bad 2" not in message
    assert "and 3 more" in message
    [failure] = read_json(Path("reports/validate/failures.json"))["failures"]
    assert [shown["id"] for shown in failure["rows"]] == [r.id for r in bad]
    assert failure["rows"][0]["license"] == "unknown"
    assert read_json(Path("reports/validate/metrics.json"))["critical_failures"] == 1
    assert "bad 0" in Path("reports/validate/data_docs/index.html").read_text()


def test_too_few_rows_say_where_the_others_went(project):
    project(good_rows(12), min_rows=40)
    write_json(
        Path("reports/collect/metrics.json"),
        {"rows": 60, "rejected": 3, "rejected_by_reason": {"no_answer": 1, "broken_json": 2}},
    )
    write_json(
        Path("reports/curate/metrics.json"),
        {"kept": 12, "rejected": 48, "rejected_by_reason": {"personal_email": 8, "near_duplicate": 40}},
    )
    with pytest.raises(InputError) as error:
        main()
    for line in (
        "collect: 60 of 63 rows left; rejected: 2 broken_json, 1 no_answer (artifacts/collect/rejects.jsonl ",
        "curate: 12 of 60 rows left; rejected: 40 near_duplicate, 8 personal_email (artifacts/curate/rejects",
    ):
        assert line in error.value.what
    assert "read the rejected rows" in error.value.fix and "failures.json" not in error.value.fix


def test_a_warning_is_recorded_and_does_not_stop(project):
    severity = dict.fromkeys(SUBJECTS, "critical") | {"licenses": "warning"}
    project([*good_rows(), row("odd", license="unknown")], severity=severity)
    main()
    evidence = read_json(Path("reports/validate/metrics.json"))
    assert (evidence["success"], evidence["warnings"]) == (True, 1)


def test_missing_rows_name_the_stage_that_makes_them(project):
    project(good_rows())
    shutil.rmtree("artifacts")
    with pytest.raises(InputError, match=r"rows\.parquet does not exist") as error:
        main()
    assert "dvc repro curate" in error.value.fix


def test_two_runs_write_the_same_bytes(project):
    def contents():
        with pytest.raises(InputError):
            main()
        return {path: path.read_bytes() for path in Path("reports").rglob("*") if path.is_file()}

    project([*good_rows(), row("odd", license="unknown")])
    assert contents() == contents()


def test_the_page_has_no_outside_reference_and_runs_nothing_from_the_data(project):
    project([*good_rows(), row("<script>alert(1)</script>", license="<img src=x onerror=alert(1)>")])
    with pytest.raises(InputError):
        main()
    page = Path("reports/validate/data_docs/index.html").read_text()
    assert not re.search(r"<script|<link|<img|href=|src=[\"']|https?://|@import|url\(", page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_the_page_draws_measurements_and_quantiles_without_a_script(project):
    measured = {
        "type": "ExpectColumnMeanToBeBetween",
        "column": "answer_chars",
        "min_value": 1,
        "max_value": 2,
    }
    ranges = {"quantiles": [0.5, 0.9], "value_ranges": [[1, 2], [1, None]]}
    spread = {
        "type": "ExpectColumnQuantileValuesToBeBetween",
        "column": "answer_chars",
        "quantile_ranges": ranges,
    }
    project(good_rows(), expectations=[spec | {"severity": "warning"} for spec in (measured, spread)])
    main()
    page = Path("reports/validate/data_docs/index.html").read_text()
    assert "<script" not in page
    assert "Traceback" not in page and "mean must be" in page


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_browser_without_network_draws_the_page(project, tmp_path):
    project([*good_rows(), row("odd", license="unknown")])
    with pytest.raises(InputError):
        main()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
    page = Path("reports/validate/data_docs/index.html").resolve().as_uri()
    dom = subprocess.run(
        ["chromium", *flags, f"--user-data-dir={tmp_path / 'profile'}", page],
        capture_output=True,
        text=True,
        timeout=300,
    ).stdout
    assert "1 critical expectation failed" in dom and "odd" in dom


def test_long_texts_are_not_copied_but_for_a_column_that_the_user_names():
    """Great Expectations takes the table as it is; by default it would hash it, in copies of all texts."""
    rows = [row(f"request {n} " + chr(97 + n % 26) * 200_000) for n in range(50)]
    own = [{"type": "ExpectColumnValuesToMatchRegex", "column": "question", "regex": "^request"}]
    for expectations, share in (((), 0.2), (own, 0.5)):
        outcomes(rows, expectations, max_prompt_chars=300_000)  # imports and caches
        tracemalloc.start()
        found = outcomes(rows, expectations, max_prompt_chars=300_000)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert not failed(found)
        assert peak < share * sum(len(one.question) for one in rows)


def test_the_table_has_the_texts_that_expectations_of_the_user_can_read():
    condition = {"type": "ExpectColumnValuesToNotBeNull", "column": "id", "row_condition": "answer != 'x'"}
    assert find_read_texts([]) == set()
    assert find_read_texts([{"type": "ExpectColumnValuesToBeUnique", "column": "question"}]) == {"question"}
    assert find_read_texts([condition]) == {"answer"}
    assert find_read_texts([{"type": "ExpectColumnMeanToBeBetween", "column": "answer_chars"}]) == set()
    assert find_read_texts([{"type": "ExpectTableColumnCountToBeBetween", "min_value": 12}]) == set(TEXTS)
    assert {"question", "answer"}.isdisjoint(build_table(good_rows(), TASK, set()).columns)


def test_rows_are_shown_with_their_texts_where_the_table_has_none(project):
    project([*good_rows(), row("Zürich ☀", license="unknown")])
    with pytest.raises(InputError):
        main()
    [failure] = read_json(Path("reports/validate/failures.json"))["failures"]
    assert failure["rows"][0]["question"] == "Zürich ☀"


def test_great_expectations_hashes_a_table_unless_it_is_told_not_to(monkeypatch):
    """What the stage relies on: a release that hashes elsewhere, or by another rule, fails here."""
    import great_expectations as gx
    from great_expectations.execution_engine import pandas_execution_engine

    hashed = []
    monkeypatch.setattr(pandas_execution_engine, "hash_pandas_dataframe", hashed.append)
    source = gx.get_context(mode="ephemeral").data_sources.add_pandas("x")
    batch = source.add_dataframe_asset("x").add_batch_definition_whole_dataframe("x")
    table = build_table([row("turn it on")], TASK, set())
    batch.get_batch({"dataframe": table})
    assert len(hashed) == 1
    with hash_no_table():
        batch.get_batch({"dataframe": table})
    assert len(hashed) == 1
    batch.get_batch({"dataframe": table})
    assert len(hashed) == 2
