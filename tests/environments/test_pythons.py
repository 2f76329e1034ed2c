"""The interpreters of this machine are found by version, also where the first of a name does not run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.environments.pythons import find_interpreter, find_interpreters, read_version
from tests.environments.wheels import ROOT

HERE = "{}.{}".format(*sys.version_info)


@pytest.fixture
def shim(tmp_path):
    """The first python of this version on the PATH, which does not run: pyenv has such a file."""
    path = tmp_path / f"python{HERE}"
    path.write_text("#!/bin/sh\nexit 127\n")
    path.chmod(0o755)
    return path


def test_the_running_version_is_found():
    found = find_interpreter(HERE)
    assert read_version(found) == HERE


def test_what_does_not_run_is_passed_over(shim, monkeypatch):
    monkeypatch.setenv("PATH", os.pathsep.join((str(shim.parent), os.environ["PATH"])))
    assert read_version(shim) is None
    assert find_interpreter(HERE) not in (None, shim)


def test_a_version_that_is_not_installed_is_skipped():
    assert list(find_interpreters(["2.1", HERE])) == [HERE]


def test_make_refuses_a_python_out_of_range_with_its_version_and_the_fix(tmp_path):
    old = tmp_path / "python3.10"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.10.2 || exit 1\n')
    old.chmod(0o755)
    python = tmp_path / "venv/bin/python"
    words = ("make", f"VENV={tmp_path}/venv", f"PYTHON={old}", str(python))
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert not python.exists()
    assert "3.14 is needed; found: Python 3.10.2" in done.stdout
    assert "fix: install one, or name it: make PYTHON=" in done.stdout


def test_make_takes_the_first_python_in_range_that_runs(tmp_path, shim, monkeypatch):
    monkeypatch.setenv("PATH", os.pathsep.join((str(shim.parent), os.environ["PATH"])))
    words = ("make", "--dry-run", f"VENV={tmp_path}/venv", f"{tmp_path}/venv/bin/python")
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    chosen = re.search(r'^"(.+)" -m venv', done.stdout, re.M)[1]
    assert read_version(Path(chosen)) in ("3.11", "3.12", "3.13", "3.14")
