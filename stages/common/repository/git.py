"""Calls of git."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from stages.common.errors import InputError

TIMEOUT_S = 300.0


def run_git(folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> str:
    """Run git in a folder and return its output.

    Args:
        folder: the working folder.
        arguments: as ("rev-parse", "HEAD").
        environment: variables to add, as GIT_DIR; those of a calling git hook are dropped.

    Raises:
        InputError: git is not installed, or fails.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env={**kept, **(environment or {})},
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"git {arguments[0]} cannot run in {folder}: {error}", "install git") from None
    if done.returncode:
        message = done.stderr.strip() or f"exit code {done.returncode}"
        raise InputError(f"git {arguments[0]} fails in {folder}: {message}", "run in a git checkout")
    return done.stdout


def read_git(folder: Path, *arguments: str) -> str | None:
    """Return the output of git in a folder, without its last newline; None if git fails."""
    try:
        return run_git(folder, *arguments).rstrip()
    except InputError:
        return None
