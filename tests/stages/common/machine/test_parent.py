"""Children of a parent that is killed end by themselves."""

import signal
import subprocess
import sys
import time

import psutil

WITHIN_S = 120  # on a busy machine; they end within a second
OURS = (
    "import os, subprocess, sys, threading, time; "
    "from stages.common.machine.parent import *; end_with_parent(); "
)
CHILD = f"""
{OURS}
# What it starts has another parent, and must not take it for an orphan.
print(subprocess.run([sys.executable, "-c", {OURS!r}]).returncode, flush=True)
time.sleep(600)
"""
PARENT = f"""
{OURS}
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], env={{**os.environ, **make_parent_variable()}})
print(child.pid, flush=True)
time.sleep(600)
"""


def start(code):
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def wait_for_end(process):
    deadline = time.monotonic() + WITHIN_S
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_child_ends_when_its_parent_is_killed():
    with start(PARENT) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        assert parent.stdout.readline() == "0\n"
        assert child.is_running()
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        wait_for_end(child)


def test_a_parent_that_is_gone_before_the_child_looks_ends_it_too():
    with start(OURS + "end_with_parent(1 << 30); time.sleep(600)") as child:
        assert child.wait(WITHIN_S) == -signal.SIGTERM


def test_a_program_that_a_person_starts_is_left_alone():
    with start(OURS + "print(threading.active_count())") as process:
        assert process.stdout.read() == "1\n"


SERVICE = """
import time
from services.schemas import trials
process = trials._Process()
print(process._process.pid, flush=True)
time.sleep(600)
"""


def test_the_process_for_schemas_ends_when_the_service_is_killed():
    with start(SERVICE) as service:
        child = psutil.Process(int(service.stdout.readline()))
        service.send_signal(signal.SIGKILL)
        service.wait()
        wait_for_end(child)
