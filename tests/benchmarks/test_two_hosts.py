"""The script of two hosts: it says what the machine lacks, and starts nothing then."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "two_hosts.sh"


def run(tmp_path, **commands):
    """Run the script with no commands but these, each with what it prints."""
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\necho {text}\n")
        (tmp_path / name).chmod(0o755)
    return subprocess.run(
        ["/bin/bash", SCRIPT], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(not os.path.exists("/bin/bash"), reason="the script is for bash")
@pytest.mark.parametrize(
    ("commands", "message"),
    [
        ({"uname": "Darwin"}, "network namespaces are a part of Linux, and this is Darwin"),
        ({"uname": "Linux", "id": "1000"}, "only root can make network namespaces: run it with sudo"),
        ({"uname": "Linux", "id": "0"}, "there is no ip: install iproute2"),
    ],
)
def test_a_machine_without_what_it_needs_is_told_so(tmp_path, commands, message):
    found = run(tmp_path, **commands)
    assert (found.returncode, found.stdout, found.stderr) == (2, "", f"two_hosts: {message}\n")
