import json
import os
import subprocess
import sys

import psutil
import pytest

from flows.common import processes
from flows.training import run_lock
from stages.common.artifacts import STATE
from stages.common.errors import InputError

SLEEP = ["sleep", "60"]
STUBBORN = """
import signal, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(60)
"""


def sleeper(**environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(SLEEP, env={**os.environ, **environment}, start_new_session=True)


def leave_record(root, **fields):
    folder = root / STATE
    folder.mkdir()
    record = {"pid": 4321, "run_id": "old", "started": "2026-11-21 03:00:00+00:00", "name": "x", "stages": []}
    (folder / "run.json").write_text(json.dumps({**record, **fields}))


def test_the_record_says_who_holds_the_lock_and_what_runs(tmp_path):
    with run_lock.hold(tmp_path) as lock:
        with lock.at_stage("collect"), lock.at_stage("fetch_base"):
            record = run_lock.read_record(tmp_path / STATE)
        assert record is not None
        assert record.pid == os.getpid() and record.stages == ("collect", "fetch_base")
        assert record.run_id == lock.run_id == os.environ[processes.RUN_ID_VARIABLE]
    assert run_lock.read_record(tmp_path / STATE) is None
    assert processes.RUN_ID_VARIABLE not in os.environ


def test_a_second_holder_is_refused_with_the_name_of_the_first(tmp_path):
    match = f"pid {os.getpid()}, started "
    with run_lock.hold(tmp_path), pytest.raises(InputError, match=match), run_lock.hold(tmp_path, wait=False):
        pass


def test_a_killed_run_is_told_and_its_processes_are_ended(tmp_path, caplog):
    leave_record(tmp_path, stages=["finetune"])
    ours = sleeper(PERENNIAL_RUN_ID="old")
    other = sleeper(PERENNIAL_RUN_ID="another run")
    try:
        with run_lock.hold(tmp_path):
            ours.wait(timeout=300)
            assert other.poll() is None, "a process of another run is left alone"
    finally:
        for process in (ours, other):
            process.kill()
            process.wait()
    killed, ended = caplog.messages[:2]
    assert killed == "the last run (pid 4321, started 2026-11-21 03:00:00+00:00) was killed during finetune"
    assert ended == "ended 1 process that it left behind"


def test_the_pid_of_a_killed_run_may_belong_to_another_program_by_now(tmp_path):
    innocent = sleeper()
    leave_record(tmp_path, pid=innocent.pid)
    try:
        with run_lock.hold(tmp_path):
            assert innocent.poll() is None
    finally:
        innocent.kill()
        innocent.wait()


def test_a_record_cut_short_does_not_stop_the_next_run(tmp_path):
    (tmp_path / STATE).mkdir()
    (tmp_path / STATE / "run.json").write_text('{"pid": 12')

    with run_lock.hold(tmp_path, wait=False):
        pass


def test_a_process_that_ignores_gentle_signals_is_killed():
    process = subprocess.Popen(
        [sys.executable, "-c", STUBBORN],
        env={**os.environ, "PERENNIAL_RUN_ID": "stubborn"},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    quick = tuple((number, 0.3) for number, _ in processes.TERMINATION)

    assert processes.terminate_orphans("stubborn", quick) == 1
    assert not psutil.pid_exists(process.pid) or process.wait(timeout=300) == -9
    process.stdout.close()
