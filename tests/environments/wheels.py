"""Check that every pin of requirements.lock has a wheel for every supported Python and platform.

`make check-wheels` reads the package index's metadata (a few seconds, no download) and prints one line for
each pin that has no wheel for a target; it exits 1 if there is one.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.markers import Marker
from packaging.tags import Tag, compatible_tags, cpython_tags, mac_platforms
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).parents[2]
PYTHONS = ((3, 11), (3, 12), (3, 13), (3, 14))
# The oldest systems that the lock serves: glibc 2.31 is in Debian 11 and Ubuntu 20.04 (llguidance needs it),
# 2.35 in Ubuntu 22.04 and Debian 12 (openvino on ARM); torch needs macOS 14.
GLIBC_MINOR = {"x86_64": 31, "aarch64": 35}
MACOS = (14, 0)
# Pure Python, published as source only: pip builds them anywhere, without a compiler.
SOURCE_ONLY = frozenset({"antlr4-python3-runtime", "rouge-score"})


@dataclass(frozen=True)
class Target:
    """A Python version on a platform."""

    python: tuple[int, int]
    system: str  # as sys.platform: `linux` or `darwin`
    machine: str  # as platform.machine()

    def __str__(self) -> str:
        return f"{self.python[0]}.{self.python[1]} {self.system} {self.machine}"


TARGETS = tuple(
    Target(python, system, machine)
    for python in PYTHONS
    for system, machine in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
)


def find_missing_wheels(pylock: dict[str, Any], targets: tuple[Target, ...] = TARGETS) -> Iterator[str]:
    """Yield `name==version: targets` for each package without a wheel for a target that its marker admits.

    Args:
        pylock: a parsed lock in the format of PEP 751, which lists the files of every package.
    """
    tags = {target: list_tags(target) for target in targets}
    for package in pylock["packages"]:
        if package["name"] in SOURCE_ONLY:
            continue
        marker = Marker(package["marker"]) if "marker" in package else None
        offered: set[Tag] = set()
        for wheel in package.get("wheels", ()):
            offered |= parse_wheel_filename(wheel["url"].rsplit("/", 1)[-1])[3]
        missing = [
            str(target)
            for target in targets
            if (marker is None or marker.evaluate(list_markers(target))) and not offered & tags[target]
        ]
        if missing:
            yield f"{package['name']}=={package['version']}: {', '.join(missing)}"


def list_tags(target: Target) -> set[Tag]:
    """Return the wheel tags that pip accepts on a target."""
    if target.system == "darwin":
        platforms = list(mac_platforms(MACOS, target.machine))
    else:
        minors = range(GLIBC_MINOR[target.machine], 4, -1)
        platforms = [f"manylinux_2_{minor}_{target.machine}" for minor in minors]
        platforms += [f"manylinux{year}_{target.machine}" for year in ("2014", "2010", "1")]
    interpreter = "cp{}{}".format(*target.python)
    return {
        *cpython_tags(target.python, platforms=platforms),
        *compatible_tags(target.python, interpreter, platforms),
    }


def list_markers(target: Target) -> dict[str, str]:
    """Return the environment that markers are evaluated in on a target."""
    version = "{}.{}".format(*target.python)
    return {
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "platform_machine": target.machine,
        "platform_system": target.system.capitalize(),
        "sys_platform": target.system,
        "os_name": "posix",
        "python_version": version,
        "python_full_version": f"{version}.9",
    }


def read_index(lock: Path) -> dict[str, Any]:
    """Return the files that the package index has for every pin of a lock."""
    options = ("--universal", "--no-deps", "--quiet", "--format", "pylock.toml")
    done = subprocess.run(
        ("uv", "pip", "compile", str(lock), *options), check=True, stdout=subprocess.PIPE, text=True
    )
    return tomllib.loads(done.stdout)


def main() -> int:
    """Print the pins without a wheel, and return the exit code."""
    missing = list(find_missing_wheels(read_index(ROOT / "requirements.lock")))
    for line in missing:
        print(f"no wheel: {line}")
    print(f"{len(missing)} pins without a wheel for one of {len(TARGETS)} targets")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
