"""What `compress` starts ends with it: here a child waits for a file that nobody writes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from stages.common.artifacts import make_folder

REPO = Path(__file__).parents[3]
WITHIN_S = 120  # on a busy machine
HEAL = "from pathlib import Path; from stages.compress.healing import run_training; run_training(Path())"
ASK = """
from stages.compress import asking
from wait import wait
asking._ask = wait  # instead of a model that is asked
asking.ask_in_process("exported", None, None, 1, None)
"""
WAIT = "def wait(*_): open('params.yaml').read()"


def open_once_it_is_read(pipe):
    """Return the writing end of a named pipe, once another process reads it."""
    deadline = time.monotonic() + WITHIN_S
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.parametrize("code", [HEAL, ASK], ids=["heal", "ask"])
def test_a_child_ends_when_compress_is_killed(tmp_path, code):
    train = tmp_path / "artifacts/split/train.parquet"
    make_folder(train.parent)
    train.touch()
    (tmp_path / "wait.py").write_text(WAIT)
    os.mkfifo(tmp_path / "params.yaml")
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment) as compress:
        pipe = open_once_it_is_read(tmp_path / "params.yaml")
        try:
            children = psutil.Process(compress.pid).children(recursive=True)
            assert children
            compress.send_signal(signal.SIGKILL)
            _, alive = psutil.wait_procs(children, WITHIN_S)
            for process in alive:
                process.kill()
            assert not alive
        finally:
            os.close(pipe)
            compress.kill()
