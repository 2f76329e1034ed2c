"""The interpreters of this machine are found by version, also where the first of a name does not run."""

import os
import sys

import pytest

from checks.pythons import find_interpreter, find_interpreters, read_version

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


def test_a_version_that_is_not_installed_is_left_out():
    assert list(find_interpreters(["2.1", HERE])) == [HERE]
