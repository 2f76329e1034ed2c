"""The store of versions, its command, the alias file and the journal.

BentoML's store belongs to a process, so commands run in processes of their own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.versions.aliases import ALIASES, Aliases, Challenger, read_aliases, write_aliases
from services.versions.releases import RELEASES, Release, append_release, read_releases
from services.versions.store import check_parity
from stages.common.artifacts import write_json
from stages.common.errors import InputError
from tests.tiny import save_model

ROOT = Path(__file__).resolve().parents[3]
NAME = "tiny"
A, B = (f"{NAME}:{letter * 12}" for letter in "ab")


def make_output(root: Path, version: str) -> None:
    """Write what the pipeline leaves for the service."""
    base, adapter, export = (root / "artifacts" / name for name in ("fetch_base", "finetune", "export"))
    save_model(base)
    adapter.mkdir(exist_ok=True)
    (adapter / "adapter_config.json").write_text("{}")
    export.mkdir(exist_ok=True)
    (export / "model.gguf").write_bytes(version.encode())
    (export / "serving.json").write_text(json.dumps({"name": NAME, "version": version}))


@pytest.fixture
def project(tmp_path):
    """Return a folder with the parameters, and a function that runs Python in it with a store of its own."""
    text = (ROOT / "params.yaml").read_text()
    assert "name: home-intents-smollm2-135m" in text
    (tmp_path / "params.yaml").write_text(text.replace("name: home-intents-smollm2-135m", f"name: {NAME}"))

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "BENTOML_HOME": str(tmp_path / "bentoml"), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return tmp_path, run


def served(run, follow_pipeline=True):
    """Return what a service would serve that starts now, or the error."""
    code = f"from services.versions.store import find_served; print(find_served({NAME!r}, {follow_pipeline}))"
    done = run("-c", code)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def test_versions_are_added_listed_and_shown_and_the_store_keeps_its_own_copies(project):
    folder, run = project
    make_output(folder, "a" * 12)
    assert run("-m", "services.versions", "add").stdout == f"{A} is in the store\n"
    make_output(folder, "b" * 12)  # the pipeline overwrites its output
    run("-m", "services.versions", "add")
    write_aliases(folder / ALIASES, Aliases(A, Challenger(B, 0.1, "canary", 1.0)))
    listed = run("-m", "services.versions", "list").stdout
    assert listed == f"{A} champion\n{B} challenger (canary, 10%)\n"
    stored = folder / "bentoml/models/tiny" / ("a" * 12)
    assert (stored / "export/model.gguf").read_bytes() == b"a" * 12
    shown = run("-m", "services.versions", "show", A).stdout
    assert f"version  {'a' * 12}" in shown and str(stored / "export") in shown


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("show", "tiny:nothing"), "the model store has no tiny:nothing"),
        (("add",), "artifacts/export/serving.json does not exist"),
    ],
)
def test_a_command_that_fails_names_the_problem(project, arguments, problem):
    _, run = project
    done = run("-m", "services.versions", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {problem}"), done.stderr


def test_before_the_first_release_the_pipelines_newest_model_is_served_and_then_the_champion(project):
    folder, run = project
    make_output(folder, "a" * 12)
    assert served(run) == A
    make_output(folder, "b" * 12)
    assert served(run) == B
    assert not (folder / ALIASES).exists(), "reading moves no alias"
    (folder / "artifacts/export/serving.json").unlink()  # the pipeline writes its next model
    assert served(run) == B
    write_aliases(folder / ALIASES, Aliases(A))
    assert served(run) == A


def test_without_follow_pipeline_only_a_champion_is_served(project):
    folder, run = project
    make_output(folder, "a" * 12)
    assert "no version is champion" in run("-c", FIND_WITHOUT_FOLLOWING).stderr
    run("-m", "services.versions", "add")
    write_aliases(folder / ALIASES, Aliases(A))
    assert served(run, follow_pipeline=False) == A


FIND_WITHOUT_FOLLOWING = "from services.versions.store import find_served; find_served('tiny', False)"


def test_a_version_that_parity_rejected_is_named_with_the_reasons(tmp_path):
    write_json(
        tmp_path / "reports/parity/2.json", {"agrees": False, "reasons": ["exact match falls by 0.02"]}
    )
    write_json(tmp_path / "reports/parity/3.json", {"agrees": True, "reasons": []})
    with pytest.raises(InputError, match="m:2 does not answer as it was trained to: exact match falls"):
        check_parity("m:2", tmp_path)
    check_parity("m:3", tmp_path)
    check_parity("m:4", tmp_path)


def made(**changes) -> Release:
    values = {"id": "1", "at": 5.0, "action": "promote", "tag": "m:2", "by": "me", "reason": "ü"}
    return Release(**values | {"champion": "m:2", "challenger": "m:3", "former": "m:1"} | changes)


def test_aliases_survive_writing_and_reading(tmp_path):
    path = tmp_path / ALIASES
    assert read_aliases(path) == Aliases()
    aliases = Aliases(
        "m:2",
        Challenger("m:3", 0.1, "shadow", 7.0),
        ("m:1",),
        champion_since=5.0,
        replaced="m:1",
        pinned="audit",
        release=made(),
    )
    write_aliases(path, aliases)
    assert read_aliases(path) == aliases


@pytest.mark.parametrize("text", ['{"champion": "m:1"}', '{"who": "m:1", "challenger": null, "history": []}'])
def test_a_broken_alias_file_is_named_with_the_fix(tmp_path, text):
    path = tmp_path / "aliases.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"is not a valid alias file[\s\S]*perennial release promote"):
        read_aliases(path)


def test_the_journal_keeps_a_release_once_and_drops_a_line_cut_off_by_a_kill(tmp_path):
    append_release(tmp_path, made())
    append_release(tmp_path, made())
    with (tmp_path / RELEASES).open("a") as file:
        file.write('{"id": "half')
    assert read_releases(tmp_path) == [made()]
    append_release(tmp_path, made(id="2"))
    assert read_releases(tmp_path) == [made(), made(id="2")]


def test_a_line_that_is_not_a_release_is_named(tmp_path):
    append_release(tmp_path, made())
    with (tmp_path / RELEASES).open("a") as file:
        file.write('{"id": "2"}\n')
    with pytest.raises(InputError, match=r"releases.jsonl, line 2 is not a valid release"):
        read_releases(tmp_path)
