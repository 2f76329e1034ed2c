import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from monitoring import workspace
from monitoring.report import (
    METHOD,
    draw,
    make_report,
    write_report,
)
from monitoring.traffic.columns import VECTOR_SIZE, Column, build_table_schema
from monitoring.workspace import PROJECT, WORKSPACE, add_to_workspace
from stages.common.errors import InputError
from tests.flows.loop_traces import change, verdict

COLUMNS = (
    Column("prompt_chars", "input", "number", None, "characters", ""),
    Column("language", "input", "category", None, "", ""),
    Column("prompt_vector", "input", "vector", None, "", ""),
    Column("valid_output", "quality", "flag", "down", "", ""),
    Column("thumb", "quality", "flag", "down", "", ""),
)


def table(rows, *, first=0, per_session=5, german=0.0, thumbs=True):
    """Feature rows: the session of a row is its number over `per_session`."""
    rng = np.random.default_rng(first)
    vectors = rng.normal(size=(rows, VECTOR_SIZE)).astype(np.float32) + 0.5
    numbers = range(first, first + rows)
    return pa.table(
        {
            "request_id": [f"r{number}" for number in numbers],
            "received_at": [float(number) for number in numbers],
            "session": [f"s{number // per_session}" for number in numbers],
            "version": ["4b5c6d7e8f90"] * rows,
            "prompt_chars": rng.lognormal(3, 0.4, rows),
            "language": ["de" if number % 100 < 100 * german else "en" for number in numbers],
            "prompt_vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), VECTOR_SIZE),
            "valid_output": [float(number % 4 != 0) for number in numbers],
            "thumb": [1.0 if thumbs and number % 10 == 0 else None for number in numbers],
        },
        schema=build_table_schema(COLUMNS),
    )


def pages(rows, page, **options):
    return [table(min(page, rows - first), first=first, **options) for first in range(0, rows, page)]


def test_whole_sessions_are_drawn_and_the_same_ones_each_time():
    drawn, again = draw(pages(3000, 250), 400), draw(pages(3000, 250), 400)
    sessions = drawn.frame["session"].to_pylist()
    assert drawn.rows == 3000 and 390 < len(sessions) <= 400
    assert {sessions.count(one) for one in set(sessions)} == {5}
    assert sessions == again.frame["session"].to_pylist()


def test_which_sessions_are_drawn_does_not_depend_on_how_rows_were_paged():
    by_page = {size: set(draw(pages(1200, size), 200).frame["session"].to_pylist()) for size in (70, 1200)}
    assert by_page[70] == by_page[1200]


def test_few_rows_are_all_drawn_and_figures_count_every_row():
    drawn = draw(pages(40, 16), 100)
    assert drawn.frame.num_rows == 40
    whole = draw(pages(2000, 300), 100)
    assert whole.frame.num_rows <= 100
    assert whole.means["valid_output"] == 0.75 and whole.means["thumb"] == 1.0


def test_one_session_larger_than_all_that_may_be_drawn_is_cut():
    drawn = draw(pages(900, 300, per_session=10_000), 250)
    assert drawn.frame.num_rows == 250 and drawn.rows == 900


def test_no_tables_at_all_are_told():
    with pytest.raises(InputError, match="no rows to report on"):
        draw([], 100)


def judged(**options):
    changes = {
        "input": [
            change("language", "category", drifted=True, effect=0.31),
            change("prompt_chars", "number", effect=0.04),
            change("prompt_vector", "vector", effect=0.02),
        ],
        "quality": [change("valid_output", "flag"), change("thumb", "flag"), change("corrected", "flag")],
    }
    return verdict(1_790_000_000.0, drifted=True, columns=changes, **options)


def values(snapshot):
    """The figures of a run by name: those of a column by its name."""
    found = {}
    for one in json.loads(snapshot.json())["metrics"]:
        found[(one["config"]["type"].rpartition(":")[2], one["config"].get("column"))] = one["value"]
    return found


@pytest.mark.slow
def test_evidently_is_told_our_effects_and_decisions():
    snapshot = make_report([table(600)], pages(500, 200, german=0.9), judged(rows=12_000), 300)
    found = values(snapshot)
    assert found["ValueDrift", "language"] == pytest.approx(0.31)
    assert found["ValueDrift", "prompt_chars"] == pytest.approx(0.04)
    assert found["ValueDrift", "prompt_vector"] == pytest.approx(0.02)
    assert found["DriftedColumnsCount", None]["count"] == 1
    # Figures of the whole window, though only 300 rows of it are drawn.
    assert found["RowCount", None] == 12_000
    assert found["MeanValue", "valid_output"] == 0.75
    assert found["QuantileValue", "total_s"] == pytest.approx(0.61)
    html = snapshot.get_html_str(as_iframe=False)
    assert "300 of 500 rows drawn, whole sessions" in html and METHOD not in html


@pytest.mark.slow
def test_a_column_without_values_and_a_window_that_was_not_judged_raise_nothing(tmp_path):
    path = tmp_path / "report.html"
    write_report([table(200)], [table(200, thumbs=False)], judged(), path)
    text = path.read_text()
    assert "because one side has no value: thumb" in text
    # Complete in itself: no script, style or picture from elsewhere.
    assert not re.search(r'<(?:script|link|img)\b[^>]{0,300}\b(?:src|href)="(?:https?:)?//', text)
    not_judged = make_report([table(200)], [table(40)], verdict(1_790_000_000.0, judged=False))
    assert ("ValueDrift", "language") not in values(not_judged)
    assert "only 42 rows, 100 are needed" in not_judged.get_html_str(as_iframe=False)


READ = """
import json, sys
from evidently.ui.workspace import Workspace
workspace = Workspace.create(sys.argv[1])
(project,) = workspace.list_projects()
runs = [workspace.get_run(project.id, run) for run in workspace.list_runs(project.id)]
panels = [panel.title for panel in project.dashboard.model().panels]
print(json.dumps({"name": project.name, "runs": sorted(run.name for run in runs), "panels": panels}))
"""


@pytest.mark.slow
def test_the_workspace_holds_each_window_once_and_reads_without_us(tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "MAX_RUNS", 2)
    ends = [1_790_000_000.0 + 3600 * number for number in range(3)]
    for end in (ends[0], ends[1], ends[1], ends[2]):
        one = verdict(end, drifted=True)
        add_to_workspace(tmp_path, one, make_report([table(200)], [table(100)], one))
    # In a process that knows nothing of this package, as Evidently's own page.
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / WORKSPACE)], cwd=tmp_path, capture_output=True, text=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["name"] == PROJECT
    assert found["runs"] == sorted(verdict(end).id for end in ends[1:])
    assert "Valid output" in found["panels"] and len(set(found["panels"])) == len(found["panels"])


HOSTILE = "</script><script>document.title='XSS'</script>"


def test_keys_and_categories_of_answers_do_not_run_in_the_page(tmp_path):
    """A key of an answer is a column's name, and its value a category; anyone chooses both."""
    key = f"answer.{HOSTILE}"
    columns = (*COLUMNS, Column(key, "output", "category", None, "", ""))

    def hostile(rows, german):
        plain = table(rows, german=german)
        values = [HOSTILE if number % 7 == 0 else "<img src=x onerror=alert(1)>" for number in range(rows)]
        values = plain.append_column(key, pa.array(values))
        words = [HOSTILE if one == "de" else one for one in plain["language"].to_pylist()]
        values = values.set_column(
            plain.schema.get_field_index("language"), "language", pa.array(words, pa.string())
        )
        return values.select(["request_id", "received_at", "session", "version", *(c.name for c in columns)])

    told = [change("language", "category", drifted=True, summary=HOSTILE)]
    told += [change(key, "category", drifted=True, summary=HOSTILE)]
    told = [replace(one, before=HOSTILE, after=HOSTILE) for one in told]
    written = verdict(1_790_000_000.0, drifted=True, columns={"input": told})
    path = tmp_path / "report.html"
    snapshot = write_report([hostile(500, 0.0)], [hostile(500, 0.5)], written, path)
    page = path.read_text()
    assert "document.title" in page  # it is shown
    for raw in (HOSTILE, "<script>document", "<img src=x"):
        assert raw not in page
    # No string of the data can end the script, whoever wrote it.
    data = [line for line in page.split("\n") if line.strip().startswith("var ") and "document.title" in line]
    assert data and all("<" not in line for line in data)
    assert page.index("default-src 'none'") < page.index("<script")  # as a file it makes no request either
    add_to_workspace(tmp_path, written, snapshot)
    stored = "".join(file.read_text() for file in (tmp_path / WORKSPACE).rglob("*.json"))
    assert "document.title" in stored and "<script" not in stored and "<img" not in stored
