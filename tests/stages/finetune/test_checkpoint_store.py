"""Copies of checkpoints: a run killed in one folder goes on in another, and half a copy is never used."""

import json
import logging
import re
import shutil
import threading

import pytest

from stages.common.errors import InputError, ParamsError
from stages.common.storage.remote_folder import RemoteFolder
from stages.finetune import checkpoint_store
from stages.finetune.__main__ import main
from stages.finetune.checkpoint_store import CheckpointStore
from stages.finetune.checkpoints import mark_complete
from stages.finetune.trainer import TrainingMonitor
from tests.stages.finetune.project import adapter, change_finetune, evidence, make_project


def make_checkpoint(folder, step):
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "inner").mkdir(parents=True)
    (checkpoint / "weights").write_bytes(bytes([step]) * 100)
    (checkpoint / "inner" / "state").write_bytes(b"y" * 10)
    mark_complete(checkpoint)
    return checkpoint


@pytest.fixture(params=["file", "memory"])
def store(request, tmp_path):
    found = CheckpointStore(f"{request.param}://{tmp_path}/store", "run")
    yield found
    found.finish()


def names(tmp_path):
    return sorted(path.name for path in (tmp_path / "store" / "run").iterdir())


def test_the_newest_two_are_kept_and_fetched_where_the_folder_has_none_or_an_older_one(store, tmp_path):
    first, second, third = (make_checkpoint(tmp_path / "here", step) for step in (3, 6, 9))
    for checkpoint in (first, second, third):
        store.copy(checkpoint)
    there = tmp_path / "there"
    there.mkdir()
    own = make_checkpoint(there, 6)
    fetched = store.find_newest(there, own)
    assert fetched == there / "checkpoint-9"
    files = [path for path in third.rglob("*") if path.is_file()]
    assert len(files) == 3
    for path in files:
        assert (fetched / path.relative_to(third)).read_bytes() == path.read_bytes()
    assert store.fetch(6, tmp_path / "elsewhere") and store.fetch(3, tmp_path / "elsewhere") is None
    assert store.find_newest(there, fetched) == fetched
    newer = make_checkpoint(there, 12)
    assert store.find_newest(there, newer) == newer
    assert store.fetch(12, tmp_path / "elsewhere"), "what only this folder had is copied"


def test_half_a_copy_and_a_cut_one_are_not_used(tmp_path, caplog):
    store = CheckpointStore(f"file://{tmp_path}/store", "run")
    for step in (3, 6):
        store.copy(make_checkpoint(tmp_path / "here", step))
    half = tmp_path / "store" / "run" / "checkpoint-9"
    shutil.copytree(tmp_path / "here" / "checkpoint-6", half)
    (half / "complete.json").unlink()
    cut = tmp_path / "store" / "run" / "checkpoint-6" / "weights"
    cut.write_bytes(cut.read_bytes()[:50])
    there = tmp_path / "there"
    there.mkdir()
    assert store.find_newest(there, None) == there / "checkpoint-3"
    assert "weights is cut: it has 50 bytes of 100" in caplog.text
    assert [path.name for path in there.iterdir()] == ["checkpoint-3"]
    # A run that has gone back removes what is after it.
    store.copy(there / "checkpoint-3")
    assert names(tmp_path) == ["checkpoint-3"]


@pytest.mark.parametrize("silent", ["list_files", "read", "get"])
def test_a_store_that_is_silent_when_a_training_resumes_is_not_waited_for(silent, tmp_path, monkeypatch):
    store = CheckpointStore(f"file://{tmp_path}/store", "run")
    store.copy(make_checkpoint(tmp_path / "here", 3))
    (tmp_path / "there").mkdir()
    asked, answered = threading.Event(), threading.Event()
    monkeypatch.setattr(checkpoint_store, "COPY_PATIENCE_S", 2.0)
    monkeypatch.setattr(RemoteFolder, silent, lambda *_: asked.set() or answered.wait(60))
    try:
        with pytest.raises(InputError, match="run cannot be read: TimeoutError: no answer within"):
            store.find_newest(tmp_path / "there", None)
    finally:
        answered.set()
    assert asked.is_set()


def test_a_list_of_files_that_leads_out_of_the_checkpoint_is_not_used(tmp_path, caplog):
    store = CheckpointStore(f"file://{tmp_path}/store", "run")
    store.copy(make_checkpoint(tmp_path / "here", 3))
    listed = tmp_path / "store" / "run" / "checkpoint-3" / "complete.json"
    listed.write_text(json.dumps({"../../../evil": {"size": 1, "sha256": "0"}}))
    (tmp_path / "there").mkdir()
    assert store.find_newest(tmp_path / "there", None) is None
    assert "names ../../../evil" in caplog.text


def test_a_copy_that_fails_is_counted_and_the_next_one_is_tried(tmp_path, caplog):
    store = CheckpointStore(f"file://{tmp_path}/store", "run")
    (tmp_path / "store").write_text("a file, where the folder should be")
    store.copy(make_checkpoint(tmp_path / "here", 3))
    assert "checkpoint-3 was not copied" in caplog.text and "(1 of 1 failed)" in caplog.text
    (tmp_path / "store").unlink()
    store.copy(make_checkpoint(tmp_path / "here", 6))
    assert names(tmp_path) == ["checkpoint-6"]
    store.finish()
    assert "1 of 2 checkpoints were not copied" in caplog.text
    assert not (tmp_path / "store" / "run").exists()


def test_a_run_killed_in_one_folder_goes_on_bit_for_bit_in_another(tmp_path, monkeypatch, caplog):
    url = f"file://{tmp_path}/store"
    settings = {"dropout": 0.1, "validate_every": 0.2}
    unbroken = make_project(tmp_path / "unbroken", **settings)
    monkeypatch.chdir(unbroken)
    main()
    killed, other = (
        make_project(tmp_path / name, **settings, checkpoint_url=url) for name in ("killed", "other")
    )

    def stop_after_seven(monitor, arguments, state, *_: object, **__: object) -> None:
        if state.global_step == 7:
            raise KeyboardInterrupt

    monkeypatch.chdir(killed)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingMonitor, "on_log", stop_after_seven)
        main()
    assert len(list((tmp_path / "store").glob("*/checkpoint-[36]/complete.json"))) == 2
    shutil.rmtree(killed)
    monkeypatch.chdir(other)
    with caplog.at_level(logging.INFO):
        main()
    assert re.search(r"checkpoint-6 was fetched from file://.*\n.*resuming from step 6 of 10", caplog.text)
    assert adapter(other) == adapter(unbroken)
    assert evidence(other) == evidence(unbroken)
    assert not list((tmp_path / "store").iterdir()), "a training that is done leaves no copies"


def test_a_store_that_cannot_be_used_is_refused_before_the_training(project):
    (project / "taken").write_text("a file, where the folder should be")
    change_finetune(project, checkpoint_url=f"file://{project}/taken/store")
    with pytest.raises(InputError, match="cannot be written, read and cleared"):
        main()
    change_finetune(project, checkpoint_url="sftp://user:geheim@host/folder")
    with pytest.raises(ParamsError, match="neither a password nor a query") as caught:
        main()
    assert "geheim" not in str(caught.value) and "sftp://user:…@host/folder" in str(caught.value)
