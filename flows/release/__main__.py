"""Release a version by hand, or show the aliases: `perennial release`.

perennial release status
perennial release canary TAG --reason TEXT      # some users get its answers
perennial release promote TAG --reason TEXT     # all users do
perennial release reject TAG --reason TEXT      # its canary ends
perennial release rollback [TAG] --reason TEXT  # back to the former champion, from TAG
perennial release pin --reason TEXT             # nothing replaces the champion until unpin
perennial release unpin --reason TEXT
"""

from __future__ import annotations

import argparse
import getpass
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

from flows.common.cli import run_command
from flows.registry.tracking import Registry
from flows.release.actions import Order, release
from services.versions.aliases import ALIASES, Mode, read_aliases
from services.versions.releases import read_releases
from stages.common.params.loading import load_params

MAX_RELEASES = 10  # shown by `status`
HELP = {
    "canary": "serve a version to some users, and compare it with the champion",
    "promote": "make a version the champion: all users get its answers",
    "reject": "end the canary of a version",
    "rollback": "make the former champion the champion again",
    "pin": "keep the champion: no release replaces it until unpin",
    "unpin": "allow releases to replace the champion again",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Make a release by hand, or show the aliases; return the exit code."""
    options = _parser().parse_args(arguments)
    root = Path.cwd()

    def act() -> int:
        if options.action == "status":
            sys.stdout.write(format_status(root))
            return 0
        params = load_params(root / "params.yaml")
        share = params.flows.retrain.canary.share if options.share is None else options.share
        order = Order(
            options.action, options.tag, options.by, options.reason, share, options.mode, options.first
        )
        made = release(Registry.of(root, params), order)
        canary = f", {made.challenger} is in canary" if made.challenger else ""
        sys.stdout.write(f"{made.action}: the champion is {made.champion or 'none'}{canary}\n")
        return 0

    return run_command(act)


def format_status(root: Path) -> str:
    """Return the aliases, the pin and the last releases as lines."""
    aliases = read_aliases(root / ALIASES)
    challenger = aliases.challenger
    lines = [
        f"champion    {_with_time(aliases.champion, aliases.champion_since)}",
        f"challenger  {_with_time(challenger.tag, challenger.since) if challenger else 'none'}"
        + (f" ({challenger.mode}, {challenger.share:.0%} of the users)" if challenger else ""),
        f"pinned      {aliases.pinned or 'no'}",
    ]
    for one in reversed(read_releases(root)[-MAX_RELEASES:]):
        lines.append(f"{_format_time(one.at)}  {one.action} {one.tag} by {one.by}: {one.reason}")
    return "\n".join(lines) + "\n"


def _with_time(tag: str | None, since: float | None) -> str:
    return f"{tag or 'none'}{f' since {_format_time(since)}' if since is not None else ''}"


def _format_time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="perennial release",
        description="Show or move the aliases; the gate's verdicts decide what may be released.",
    )
    commands = parser.add_subparsers(dest="action", required=True)
    commands.add_parser("status", help="show the aliases and the last releases")
    for action, meaning in HELP.items():
        command = commands.add_parser(action, help=meaning, description=f"{meaning.capitalize()}.")
        command.set_defaults(tag=None, share=None, mode="canary", first=False)
        if action not in ("pin", "unpin"):
            command.add_argument("tag", nargs="?" if action == "rollback" else None, help="NAME:VERSION")
        if action == "canary":
            command.add_argument(
                "--share", type=_share, help="share of the users (default: flows.retrain.canary.share)"
            )
            command.add_argument(
                "--mode",
                choices=get_args(Mode),
                default="canary",
                help="canary: these users get its answers (default); shadow: it answers, but no user sees it",
            )
        if action == "promote":
            command.add_argument(
                "--first", action="store_true", help="promote without the gate, while there is no champion"
            )
        command.add_argument("--reason", required=True, help="reason, for the journal")
        command.add_argument(
            "--by", default=getpass.getuser(), help="your name, for the journal (default: the login name)"
        )
    return parser


def _share(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
