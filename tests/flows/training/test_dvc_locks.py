import json
import os
import subprocess
import sys

import pytest

from flows.training import dvc_locks


def entry(pid: int) -> dict[str, object]:
    return {"pid": pid, "cmd": "dvc repro read"}


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def dvc_process():
    """A living process that is DVC by its command line."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "dvc", "repro"])
    yield process
    process.kill()
    process.wait()


def write(root, write=None, read=None):
    path = root / ".dvc" / "tmp" / "rwlock"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"write": write or {}, "read": read or {}}))
    return path


def test_locks_of_the_dead_are_released_and_those_of_the_living_stay(tmp_path, dvc_process):
    path = write(
        tmp_path,
        write={"a.txt": entry(dead_pid()), "b.txt": entry(dvc_process.pid)},
        read={"c.txt": [entry(dead_pid()), entry(dvc_process.pid)], "d.txt": [entry(dead_pid())]},
    )

    assert dvc_locks.clear_dead(tmp_path) == 3

    left = json.loads(path.read_text())
    assert left == {"write": {"b.txt": entry(dvc_process.pid)}, "read": {"c.txt": [entry(dvc_process.pid)]}}
    assert dvc_locks.find_writers(tmp_path) == [dvc_locks.Holder(dvc_process.pid, "dvc repro read")]


def test_a_process_id_that_another_program_has_by_now_holds_no_lock(tmp_path):
    innocent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], cwd="/")
    try:
        write(tmp_path, write={"a.txt": entry(innocent.pid)})
        assert dvc_locks.find_writers(tmp_path) == []
        assert dvc_locks.clear_dead(tmp_path) == 1
    finally:
        innocent.kill()
        innocent.wait()


def test_a_lock_file_cut_short_is_removed(tmp_path):
    path = write(tmp_path)
    path.write_text('{"write": {"a.t')

    assert dvc_locks.find_writers(tmp_path) == []
    assert dvc_locks.clear_dead(tmp_path) == 1
    assert not path.exists()


def test_nothing_is_done_without_locks(tmp_path):
    assert dvc_locks.clear_dead(tmp_path) == 0
    write(tmp_path)
    assert dvc_locks.clear_dead(tmp_path) == 0


@pytest.mark.slow
def test_dvc_runs_again_after_its_lock_of_a_reused_process_id_is_cleared(finished):
    finished.change("params.yaml", "learning_rate: 0.003", "learning_rate: 0.002")
    path = finished.root / ".dvc" / "tmp" / "rwlock"
    init = {"pid": os.getpid(), "cmd": "/somewhere/dvc/__main__.py repro train"}
    path.write_text(json.dumps({"write": {str(finished.root / "train.txt"): init}, "read": {}}))
    assert finished.dvc("repro", "train").returncode != 0, "DVC takes this living process for its holder"

    assert finished.run("--until", "train").returncode == 0
