"""The demo as a process; its results are measured by `make demo` itself."""

import subprocess
import sys
import time

import psutil
import pytest

from flows.demo.__main__ import read_last_retraining
from flows.retrain import progress
from stages.common.errors import InputError

LONG = "import time; time.sleep(600)"
# A demo that does only one thing: it starts something long, in a session of its own.
DEMO = f"""
import pathlib, subprocess, sys
from flows.demo import __main__ as demo
from flows.common.checkout import build_checkout_environment

def one_thing(root):
    long = [sys.executable, "-c", {LONG!r}]
    subprocess.run(long, env=build_checkout_environment(root), start_new_session=True)

demo._run = one_thing
demo.run(pathlib.Path("."))
"""


def test_what_a_killed_demo_started_ends_with_it():
    demo = subprocess.Popen([sys.executable, "-c", DEMO])
    started = []
    try:
        deadline = time.monotonic() + 60
        while not started and time.monotonic() < deadline:
            children = psutil.Process(demo.pid).children()
            started = [one for one in children if one.cmdline()[-1:] == [LONG]]
            time.sleep(0.05)
    finally:
        demo.kill()
        demo.wait()
    assert started
    _, left = psutil.wait_procs(started, timeout=30)
    for process in left:
        process.kill()
    assert not left


def test_a_demo_without_a_retraining_says_so(tmp_path):
    with pytest.raises(InputError, match="triggered no retraining"):
        read_last_retraining(tmp_path)
    state = progress.start(tmp_path, "drift", "w1", "m:1", since=0.0)
    result = progress.finish(tmp_path, state, "promoted", "better")
    assert read_last_retraining(tmp_path) == result
