import signal
import subprocess
import sys
from pathlib import Path

from stages.common.locks import hold_lock, try_file_lock

ROOT = Path(__file__).parents[3]
# Adds to a number in a file; without turns, what another adds meanwhile is lost.
COUNT = """
import sys, time
from pathlib import Path
from stages.common.locks import hold_lock

number = Path("number")
print("ready", flush=True)
sys.stdin.readline()
for _ in range(40):
    with hold_lock(Path("locks/of/number.lock")):
        value = int(number.read_text())
        time.sleep(0.002)
        number.write_text(str(value + 1))
"""
HOLD = """
import sys
from pathlib import Path
from stages.common.locks import hold_lock

with hold_lock(Path("held.lock")):
    print("held", flush=True)
    sys.stdin.read()
"""


def start(script, folder):
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_processes_take_turns(tmp_path):
    (tmp_path / "number").write_text("0")
    both = [start(COUNT, tmp_path) for _ in range(2)]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in both:
        process.communicate(timeout=300)
    assert [process.returncode for process in both] == [0, 0]
    assert (tmp_path / "number").read_text() == "80"


def test_a_killed_holder_lets_go(tmp_path):
    holder = start(HOLD, tmp_path)
    try:
        assert holder.stdout.readline() == "held\n"
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with hold_lock(tmp_path / "held.lock"):
        assert (tmp_path / "held.lock").read_text() == ""


def test_a_lock_that_another_process_holds_is_not_waited_for(tmp_path):
    holder = start(HOLD, tmp_path)
    try:
        assert holder.stdout.readline() == "held\n"
        with try_file_lock(tmp_path / "held.lock") as held:
            assert not held
    finally:
        holder.communicate("")
    with try_file_lock(tmp_path / "held.lock") as held:
        assert held
