"""What a process says of its own memory."""

import subprocess
import sys

import numpy as np

from stages.common.machine.memory import MIB, read_held_memory, read_peak_memory


def test_the_most_memory_is_that_of_the_process_and_not_of_the_one_that_started_it():
    before = read_peak_memory()
    assert before >= read_held_memory() - MIB
    ballast = np.ones(400 * MIB, dtype=np.uint8)
    assert read_peak_memory() > 400 * MIB
    code = "from stages.common.machine.memory import read_peak_memory; print(read_peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 200 * MIB
    assert ballast[-1] == 1
