import subprocess
import sys
from pathlib import Path

import pytest

from stages.common.repository.dvc_lock import compute_dvc_hash, find_disagreements, read_lock

# Written by DVC 3.67.1 for the files of `made`.
FOLDER_HASH = "77d276c9c61bd20564c20068cb8a577c.dir"
LOCK = f"""
schema: '2.0'
stages:
  a:
    cmd: make
    params:
      params.yaml:
        a:
          rank: 16
    outs:
    - path: b.json
      hash: md5
      md5: 764efa883dda1e11db47671c4a3bbd9e
      size: 3
    - path: out
      hash: md5
      md5: {FOLDER_HASH}
      size: 6
      nfiles: 2
  b:
    cmd: use
    deps:
    - path: out
      hash: md5
      md5: {FOLDER_HASH}
"""


STAGES = ("a", "b")


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("out/sub").mkdir(parents=True)
    Path("out/x").write_text("hi\n")
    Path("out/sub/ü.txt").write_text("ü\n", encoding="utf-8")
    Path("b.json").write_text("hi\n")
    Path("dvc.lock").write_text(LOCK)
    return [Path("out"), Path("b.json")]


def test_files_and_folders_get_the_hashes_that_dvc_gives_them(made):
    assert compute_dvc_hash(Path("out")) == FOLDER_HASH
    assert compute_dvc_hash(Path("b.json")) == "764efa883dda1e11db47671c4a3bbd9e"


@pytest.mark.slow
def test_dvc_itself_agrees(made):
    Path("dvc.lock").unlink()
    Path("dvc.yaml").write_text("stages: {a: {cmd: 'true', deps: [b.json], outs: [{out: {persist: true}}]}}")
    for command in (["init", "--no-scm", "-q"], ["repro", "-q"]):
        subprocess.run([sys.executable, "-m", "dvc", *command], check=True)
    assert read_lock(STAGES).hash_of(Path("out")) == compute_dvc_hash(Path("out")) == FOLDER_HASH


def test_the_lock_tells_hashes_and_parameters(made):
    lock = read_lock(STAGES)
    assert lock.hash_of(Path("out")) == FOLDER_HASH
    assert lock.hash_of(Path("elsewhere")) is None
    assert lock.params["a"] == {"rank": 16}


def test_unchanged_files_agree_with_the_lock(made):
    assert find_disagreements(read_lock(STAGES), [*made, Path("not/recorded")]) == []


def test_a_changed_file_is_named(made):
    Path("out/x").write_text("other\n")
    problems = find_disagreements(read_lock(STAGES), made)
    assert len(problems) == 1
    assert problems[0].startswith("out has the hash")


def test_a_stage_that_saw_other_bytes_is_named(made):
    text = LOCK[::-1].replace(FOLDER_HASH[::-1], "f" * 32, 1)[::-1]
    Path("dvc.lock").write_text(text)
    assert "b recorded ffffff" in find_disagreements(read_lock(STAGES), made)[0]


def test_what_a_stage_saw_the_last_time_is_not_held_against_what_it_sees_now(made):
    text = LOCK[::-1].replace(FOLDER_HASH[::-1], "f" * 32, 1)[::-1]
    Path("dvc.lock").write_text(text)
    assert find_disagreements(read_lock(["a"]), made) == []


def test_no_lock_records_nothing(tmp_path):
    assert read_lock(STAGES, tmp_path / "dvc.lock").params == {"task": {}}
