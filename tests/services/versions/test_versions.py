"""Aliases and the model store. The store's folder is the process's, so each test has a process of its own."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from services.versions.__main__ import (
    Aliases,
    Challenger,
    _write,
    read_aliases,
    roll_back,
    set_challenger,
    set_champion,
    take_over,
)
from stages.common.artifacts import write_json
from stages.common.errors import InputError
from tests.tiny import save_model

ROOT = Path(__file__).resolve().parents[3]


def make_output(root: Path, version: str) -> None:
    """Write what the pipeline leaves for the service."""
    base, adapter, export = (root / "artifacts" / name for name in ("fetch_base", "finetune", "export"))
    save_model(base)
    adapter.mkdir(exist_ok=True)
    (adapter / "adapter_config.json").write_text("{}")
    export.mkdir(exist_ok=True)
    (export / "model.gguf").write_bytes(version.encode())
    (export / "serving.json").write_text(json.dumps({"name": "tiny", "version": version}))


@pytest.fixture
def project(tmp_path):
    """Return a folder with the parameters, and a function that runs a command of services.versions in it."""
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "services.versions", *arguments],
            cwd=tmp_path,
            env={**os.environ, "BENTOML_HOME": str(tmp_path / "bentoml"), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return tmp_path, run


def test_a_version_is_stored_served_replaced_and_gone_back_to(project):
    folder, run = project
    make_output(folder, "a" * 12)
    assert run("add").stdout == f"tiny:{'a' * 12} is in the store\n"
    assert run("champion", f"tiny:{'a' * 12}").returncode == 0
    make_output(folder, "b" * 12)  # the pipeline writes anew over what it wrote before
    run("add")
    assert run("champion", f"tiny:{'b' * 12}").returncode == 0
    assert run("rollback").stdout == f"tiny:{'a' * 12} is champion again\n"
    assert read_aliases(folder / ".perennial/aliases.json") == Aliases(f"tiny:{'a' * 12}")
    stored = folder / "bentoml/models/tiny" / ("a" * 12)
    assert (stored / "export/model.gguf").read_bytes() == b"a" * 12, "the store holds its own copy"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("champion", "tiny:nothing"), "the model store has no tiny:nothing"),
        (("rollback",), "no version was champion before"),
        (("add",), "artifacts/export/serving.json is not there"),
        (("challenger", "tiny:x", "--share", "1.5"), "a share of 1.5 is not between 0 and 1"),
    ],
)
def test_a_wrong_change_is_refused_and_changes_nothing(project, arguments, problem):
    folder, run = project
    done = run(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {problem}"), done.stderr
    assert not (folder / ".perennial/aliases.json").exists()


def test_aliases_survive_writing_and_reading(tmp_path):
    aliases = Aliases("m:2", Challenger("m:3", 0.1, "shadow"), ("m:1",))
    path = tmp_path / "aliases.json"
    _write(path, aliases)
    assert read_aliases(path) == aliases


def test_an_alias_file_of_before_there_were_releases_is_read_as_moved_by_hand(tmp_path):
    path = tmp_path / "aliases.json"
    path.write_text('{"champion": "m:1", "challenger": null, "history": []}')
    assert read_aliases(path) == Aliases("m:1", managed=False)
    take_over(Aliases("m:1", managed=True), path)
    assert read_aliases(path).managed


def test_once_releases_manage_the_file_no_command_moves_an_alias(project):
    folder, run = project
    make_output(folder, "a" * 12)
    run("add")
    aliases, tag = folder / ".perennial/aliases.json", f"tiny:{'a' * 12}"
    take_over(Aliases("tiny:old", None, ("tiny:older",), managed=True), aliases)
    before = aliases.read_bytes()
    for words in (("champion", tag), ("challenger", tag), ("challenger", "--none")):
        done = run(*words)
        assert done.returncode == 1 and "python -m flows.release" in done.stderr, words
    with pytest.raises(InputError, match="is managed by releases"):
        roll_back(aliases)
    assert aliases.read_bytes() == before


def test_a_broken_alias_file_is_named_with_a_remedy(tmp_path):
    path = tmp_path / "aliases.json"
    path.write_text('{"champion": "m:1"}')
    with pytest.raises(InputError, match=r"is no alias file.*history|is no alias file.*challenger"):
        read_aliases(path)


def test_changes_side_by_side_do_not_lose_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr("services.versions.__main__.stored", lambda tag: None)
    path = tmp_path / "aliases.json"
    threads = [threading.Thread(target=set_champion, args=(f"m:{n}", path)) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    aliases = read_aliases(path)
    assert sorted((*aliases.history, aliases.champion)) == [f"m:{n}" for n in range(10)]


def test_a_champion_cannot_challenge_itself_and_a_crowned_challenger_is_none_any_more(tmp_path, monkeypatch):
    monkeypatch.setattr("services.versions.__main__.stored", lambda tag: None)
    path = tmp_path / "aliases.json"
    set_champion("m:1", path)
    with pytest.raises(InputError, match="m:1 is the champion"):
        set_challenger("m:1", 0.5, "canary", path)
    set_challenger("m:2", 0.5, "canary", path)
    assert set_champion("m:2", path) == Aliases("m:2", None, ("m:1",))
    assert roll_back(path).champion == "m:1"


def test_a_version_that_parity_refused_does_not_become_champion(tmp_path, monkeypatch):
    monkeypatch.setattr("services.versions.__main__.stored", lambda tag: None)
    monkeypatch.chdir(tmp_path)
    write_json(Path("reports/parity/2.json"), {"agrees": False, "reasons": ["exact match falls by 0.02"]})
    write_json(Path("reports/parity/3.json"), {"agrees": True, "reasons": []})
    path = tmp_path / "aliases.json"
    set_champion("m:1", path)
    with pytest.raises(InputError, match="m:2 does not answer as it was trained to: exact match falls"):
        set_champion("m:2", path)
    assert read_aliases(path).champion == "m:1"
    assert set_champion("m:3", path).champion == "m:3"
