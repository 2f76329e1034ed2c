import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stages import collect
from stages.common.errors import InputError
from stages.common.records import read_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project with the shipped parameters, and a way to name its sources."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()

    def name(*sources, system_prompt=None, **more):
        params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        params["task"]["system_prompt"] = system_prompt
        params["collect"] |= {"sources": list(sources), **more}
        params["model_card"] |= {"name": "own", "intended_use": None, "out_of_scope": None}
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")

    return name


def file(path, **more):
    return {"kind": "file", "path": path, "license": "cc0-1.0", **more}


def test_rows_of_several_files_are_collected_and_counted(project):
    Path("data/a.jsonl").write_text('{"prompt": "a", "completion": "1"}\n{"prompt": "b"}\n')
    Path("data/b.csv").write_text("frage,antwort\nc,3\n")
    project(
        file("data/a.jsonl"),
        file("data/b.csv", prompt_column="frage", completion_column="antwort", origin="synthetic"),
        system_prompt="Be brief.",
    )
    collect.main()
    rows = read_rows(Path("artifacts/collect/rows.parquet"))
    assert [(row.messages[0].content, row.question, row.origin) for row in rows] == [
        ("Be brief.", "a", "human"),
        ("Be brief.", "c", "synthetic"),
    ]
    (reject,) = map(json.loads, Path("artifacts/collect/rejects.jsonl").read_text().splitlines())
    assert (reject["file"], reject["line"], reject["reason"]) == ("data/a.jsonl", 2, "missing_field")
    report = json.loads(Path("reports/collect/metrics.json").read_text())
    assert (report["rows"], report["rejected"], report["by_license"]) == (2, 1, {"cc0-1.0": 2})
    assert [source["rows"] for source in report["sources"]] == [1, 1]


def test_nothing_is_written_when_a_source_is_broken(project):
    Path("data/a.jsonl").write_text('{"prompt": "a", "completion": "1"}\n{"prompt": "b"}\n')
    project(file("data/a.jsonl"), on_bad_row="stop")
    with pytest.raises(InputError, match=r"data/a\.jsonl:2: missing_field"):
        collect.main()
    assert not Path("artifacts").exists()
    assert not Path("reports").exists()


def test_the_packaged_default_and_a_file_stand_side_by_side(project):
    shipped = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["collect"]["sources"][0]
    Path("data/a.jsonl").write_text('{"prompt": "a", "completion": "1"}\n')
    project({**shipped, "rows_per_template": 1, "min_rows_per_intent": 0}, file("data/a.jsonl"))
    collect.main()
    rows = read_rows(Path("artifacts/collect/rows.parquet"))
    assert {row.license for row in rows} == {"apache-2.0", "cc0-1.0"}
    report = json.loads(Path("reports/collect/metrics.json").read_text())
    assert report["sources"][0]["intents"] == 42
    assert report["rows"] == len(rows) > 800


def test_feedback_is_collected_once_there_is_some_and_is_no_fault_before(project):
    Path("data/a.jsonl").write_text('{"prompt": "a", "completion": "1"}\n')
    feedback = {"kind": "feedback", "path": "data/feedback/rows.jsonl"}
    project(file("data/a.jsonl"), feedback, system_prompt="Be brief.")
    collect.main()
    report = json.loads(Path("reports/collect/metrics.json").read_text())
    assert report["sources"][1] == {
        "name": "data/feedback/rows.jsonl",
        "rows": 0,
        "rejected_by_reason": {},
        "file_there": False,
    }
    told = {
        "messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "2"}],
        "source": "feedback",
        "license": "cc-by-4.0",
        "group": "feedback/1",
        "tags": {"feedback": "thumb"},
    }
    Path("data/feedback").mkdir()
    Path("data/feedback/rows.jsonl").write_text(json.dumps(told) + "\n")
    collect.main()
    rows = read_rows(Path("artifacts/collect/rows.parquet"))
    assert [(row.question, row.origin, row.license) for row in rows] == [
        ("a", "human", "cc0-1.0"),
        ("b", "feedback", "cc-by-4.0"),
    ]
    assert rows[1].messages[0].content == "Be brief."


def test_feedback_alone_is_refused_while_there_is_none(project):
    project({"kind": "feedback"})
    with pytest.raises(InputError, match="the sources have no row"):
        collect.main()


def test_a_data_file_is_versioned_as_the_documentation_says(tmp_path):
    shutil.copy(ROOT / ".gitignore", tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "support.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    dvc = [sys.executable, "-m", "dvc"]
    for command in (["git", "init", "-q"], [*dvc, "init", "-q"], [*dvc, "add", "-q", "data/support.jsonl"]):
        subprocess.run(command, cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    tracked = subprocess.run(
        ["git", "ls-files", "data"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert tracked.stdout.split() == ["data/support.jsonl.dvc"]
