"""Manage API keys.

    perennial keys add NAME [--requests-per-minute N] [--tokens-per-day N]
    perennial keys list
    perennial keys revoke NAME

A key is shown once, when it is created; the file stores its SHA-256. Running servers pick up a change within
a second. As long as the file has never held a key, requests need none and are limited by address. From the
first key on, every request needs one, even if the file is lost later. Each server process counts rates and
quotas in memory, so a restart resets them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from services.keys.key_file import Key, edit_keys, make_key, read_keys
from stages.common.artifacts import STATE
from stages.common.errors import InputError

KEYS_FILE = STATE / "api_keys.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Add, list or revoke keys; return the exit status."""
    options = _parser().parse_args(arguments)
    path = options.file or find_key_file(Path("params.yaml"))
    try:
        if options.command == "add":
            lines = _add(path, options)
        elif options.command == "revoke":
            lines = _revoke(path, options.name)
        else:
            lines = [_line(key) for key in read_keys(path)] or [f"no keys in {path}"]
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


def find_key_file(params: Path) -> Path:
    """Return PERENNIAL_KEYS_FILE, else `services.access.keys_file` of the parameters, else the default.

    Reads the parameters without validation: an error in another section must not prevent revoking a key.
    """
    import yaml

    if named := os.environ.get("PERENNIAL_KEYS_FILE"):
        return Path(named)
    try:
        node: Any = yaml.safe_load(params.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return KEYS_FILE
    for name in ("services", "access", "keys_file"):
        node = node.get(name) if isinstance(node, Mapping) else None
    return Path(node) if isinstance(node, str) else KEYS_FILE


def _add(path: Path, options: argparse.Namespace) -> list[str]:
    created_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    key, token = make_key(
        options.name,
        created_at,
        requests_per_minute=options.requests_per_minute,
        tokens_per_day=options.tokens_per_day,
    )
    with edit_keys(path) as keys:
        if any(other.name == key.name for other in keys):
            raise InputError(
                f"{path} already has a key {key.name!r}", f"use another name, or revoke {key.name!r} first"
            )
        keys.append(key)
    sys.stderr.write("this key is not shown again:\n")
    return [token]


def _revoke(path: Path, name: str) -> list[str]:
    with edit_keys(path) as keys:
        left = [key for key in keys if key.name != name]
        if len(left) == len(keys):
            known = ", ".join(key.name for key in keys) or "none"
            raise InputError(f"{path} has no key {name!r}", f"its keys: {known}")
        keys[:] = left
    return [f"{name} is revoked; running servers reject it within a second"]


def _line(key: Key) -> str:
    limits = [
        f"{key.requests_per_minute} requests per minute" if key.requests_per_minute else "",
        f"{key.tokens_per_day} tokens per day" if key.tokens_per_day else "",
    ]
    return "  ".join([key.name, key.created_at, *filter(None, limits)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="perennial keys",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--file", type=Path, help="key file (default: services.access.keys_file in params.yaml)"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add", help="create a key and print it once")
    add.add_argument("name")
    add.add_argument("--requests-per-minute", type=int, help="rate limit (default: the server's)")
    add.add_argument("--tokens-per-day", type=int, help="daily quota (default: the server's)")
    commands.add_parser("list", help="list keys and their limits")
    commands.add_parser("revoke", help="delete a key").add_argument("name")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
