"""The demo as a process; what it lives through is measured by `make demo` itself."""

import subprocess
import sys
import time

import psutil
import pytest

from flows.demo_home import home_environment, make_home
from tests.flows.toy import ROOT

pytestmark = pytest.mark.slow


def processes_of(folder):
    """Return the living processes whose Prefect is at home in a folder, as for all that a demo starts."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("PREFECT_HOME", "").startswith(str(folder)):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def wait_until(is_so, seconds):
    deadline = time.monotonic() + seconds
    while not (so := is_so()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return so


def test_what_a_killed_demo_started_ends_with_it(tmp_path):
    root = make_home(ROOT, tmp_path / "checkout")
    with (tmp_path / "log").open("w") as log:
        demo = subprocess.Popen(
            [sys.executable, "-m", "flows.demo"],
            cwd=root, env=home_environment(root), stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    home = root / ".perennial" / "demo"
    try:
        assert wait_until(lambda: len(processes_of(home)) > 1, 60), (tmp_path / "log").read_text()
    finally:
        demo.kill()
        demo.wait()
    ended = wait_until(lambda: not processes_of(root), 60)
    left = [process.cmdline() for process in processes_of(root)]
    for process in processes_of(root):
        process.kill()
    assert ended, left
