"""Serve the champion: `perennial serve`.

Runs `bentoml serve` in place of this process, so that signals and the exit code are its own.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

SERVICE = "services.generation:Generation"
MAX_PORT = 65_535


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Replace this process by the service."""
    command = make_command(sys.argv[1:] if arguments is None else arguments)
    os.execv(command[0], command)


def make_command(arguments: Sequence[str]) -> list[str]:
    """Return the command line of BentoML for these arguments; options of its own are passed on."""
    options, others = _make_parser().parse_known_args(arguments)
    given = {"--host": options.host, "--port": options.port}
    ours = [word for name, value in given.items() if value is not None for word in (name, str(value))]
    return [sys.executable, "-m", "bentoml", "serve", SERVICE, *ours, *others]


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="perennial serve",
        usage="%(prog)s [-h] [--host HOST] [-p PORT] [options of bentoml serve]",
        description="Serve the champion, or the newest model until the first release: OpenAI's API "
        "under /v1, a page, metrics and probes. `services` in params.yaml configures the service.",
        epilog="Other options, such as --debug, go to `bentoml serve` as they are; its own help lists them.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--host", help="address to listen on (default: services.host); beyond loopback requests need a key"
    )
    parser.add_argument(
        "-p", "--port", type=_read_port, help="port to listen on (default: services.port in params.yaml)"
    )
    return parser


def _read_port(text: str) -> int:
    """Return the number of a port."""
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= MAX_PORT):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: use a number from 1 to {MAX_PORT}")
    return int(text)


if __name__ == "__main__":
    main()
