"""Install the lock and run the fast tests on every supported Python found on this machine.

`make check-pythons`, or `python -m tests.environments.pythons 3.13` for one. Each gets an environment in a
temporary folder that is deleted afterwards: 7 GB where torch is the CUDA build, as by default on Linux.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from tests.environments.wheels import PYTHONS, ROOT

EXTRAS = "core,serve,postgres,monitor,dev"
TESTS = ("-m", "pytest", "-m", "not slow", "--numprocesses", "2", "--dist", "loadfile")
# Where pyenv and uv keep interpreters that are not on the PATH.
PLACES = ("~/.pyenv/versions/{}.*/bin/python", "~/.local/share/uv/python/cpython-{}.*/bin/python")


def find_interpreters(versions: Iterable[str]) -> dict[str, Path]:
    """Return an interpreter for each version that this machine has, by version."""
    return {version: path for version in versions if (path := find_interpreter(version))}


def find_interpreter(version: str) -> Path | None:
    """Return an interpreter of a version such as `3.12` that runs: of the PATH, else of pyenv or uv."""
    candidates = [Path(folder) / f"python{version}" for folder in os.get_exec_path()]
    for place in PLACES:
        candidates += sorted(Path("/").glob(str(Path(place.format(version)).expanduser()).lstrip("/")))
    return next((path for path in candidates if read_version(path) == version), None)


def read_version(interpreter: Path) -> str | None:
    """Return `3.12` for an interpreter of that version, and None for what does not run."""
    if not interpreter.exists():
        return None
    code = "import sys; print('{}.{}'.format(*sys.version_info))"
    # The shims of pyenv exist for versions that are not selected, and exit 127.
    done = subprocess.run([interpreter, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def check_interpreter(interpreter: Path, folder: Path) -> str:
    """Install the lock into a new environment and run the fast tests; return `passed` or what failed."""
    python = folder / "bin" / "python"
    lock = ("--constraint", "requirements.lock")
    # DVC's stages take `python` from the PATH.
    environment = os.environ | {"PATH": os.pathsep.join((str(python.parent), *os.get_exec_path()))}
    for name, command in (
        ("creating the environment", (interpreter, "-m", "venv", folder)),
        ("installing", (python, "-m", "pip", "install", "--quiet", *lock, "--editable", f".[{EXTRAS}]")),
        ("pip check", (python, "-m", "pip", "check")),
        ("the fast tests", (python, *TESTS)),
    ):
        if subprocess.run(command, cwd=ROOT, env=environment).returncode:
            return f"{name} failed"
    return "passed"


def main() -> int:
    """Check each Python asked for, or all supported ones; return the exit code."""
    supported = ["{}.{}".format(*version) for version in PYTHONS]
    wanted = sys.argv[1:] or supported
    found = find_interpreters(wanted)
    results = dict.fromkeys(wanted, "not found on this machine")
    for version, interpreter in found.items():
        print(f"Python {version}: {interpreter}", flush=True)
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"perennial-{version}-") as folder:
            results[version] = check_interpreter(interpreter, Path(folder))
        results[version] += f" ({(time.monotonic() - began) / 60:.0f} min)"
    print("\n".join(f"Python {version}: {result}" for version, result in results.items()))
    passed = [result.startswith("passed") for version, result in results.items() if version in found]
    return 0 if passed and all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
