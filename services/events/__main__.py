"""Export, prune, forget or migrate the event store from the command line."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from services.events.database import check_url, mask_password
from services.events.opening import migrate_store, translate_errors
from services.events.person import NOT_REACHED, Person, export_person, forget
from services.events.pruning import prune
from services.events.reading import export_window
from stages.common.errors import InputError
from stages.common.logs import get_logger, run_stage

logger = get_logger("events")


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = _OneLineParser(
        prog="perennial events", description="Export, prune or migrate the event store, or forget a person."
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="export | prune | forget | migrate"
    )
    export = commands.add_parser("export", help="write exchanges and feedback as Parquet")
    export.add_argument(
        "--from", dest="start", type=_instant, help="start of the range, such as 2026-01-01T00:00 (UTC)"
    )
    export.add_argument("--to", dest="end", type=_instant, help="end of the range, not included")
    _add_person(export, required=False)
    export.add_argument("--out", type=Path, required=True, help="the file to write")
    older = commands.add_parser("prune", help="delete old exchanges and their feedback")
    older.add_argument("--older-than-days", type=_days, required=True)
    older.add_argument(
        "--clock-is-right",
        action="store_true",
        help="delete even where most events are old and the clock may have jumped",
    )
    gone = commands.add_parser("forget", help="delete the exchanges of one person, with their feedback")
    _add_person(gone, required=True)
    commands.add_parser("migrate", help="create the store, or upgrade its schema")
    for command in commands.choices.values():
        command.add_argument("--url", help="URL of the store (default: services.events.url in params.yaml)")
    arguments = parser.parse_args(words)
    if arguments.command == "export":
        window = (arguments.start, arguments.end)
        if _person(arguments) is None and None in window:
            parser.error("export needs --from and --to, or --user, or --session")
        if _person(arguments) is not None and window != (None, None):
            parser.error("--user and --session export everything of a person, without --from and --to")
        if None not in window and arguments.start >= arguments.end:
            parser.error("--from is not before --to")
    return arguments


def _add_person(command: argparse.ArgumentParser, required: bool) -> None:
    person = command.add_mutually_exclusive_group(required=required)
    person.add_argument("--user", help="`user` of the requests, as it was sent")
    person.add_argument("--session", help="`session` of the requests, as it was sent")


def _person(arguments: argparse.Namespace) -> Person | None:
    if arguments.user is not None:
        return Person("user", arguments.user)
    return None if arguments.session is None else Person("session", arguments.session)


def _instant(word: str) -> float:
    try:
        instant = datetime.fromisoformat(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r} is not a time like 2026-01-01T00:00") from None
    return (instant if instant.tzinfo else instant.replace(tzinfo=UTC)).timestamp()


def _days(word: str) -> float:
    try:
        days = float(word)
    except ValueError:
        days = math.nan
    if not 0 <= days < math.inf:
        raise argparse.ArgumentTypeError(f"{word!r} is not a number of days")
    return days


def main(words: Sequence[str] | None = None) -> None:
    """Run the command of the arguments."""
    arguments = _arguments(sys.argv[1:] if words is None else words)
    url = arguments.url or _url_of_params()
    if arguments.command == "export":
        person = _person(arguments)
        if person is not None:
            rows = export_person(url, person, arguments.out)
        else:
            rows = export_window(url, arguments.start, arguments.end, arguments.out)
        logger.info("wrote %d exchanges to %s", rows, arguments.out)
    elif arguments.command == "prune":
        days = arguments.older_than_days
        pruned = prune(url, days * 86_400, clock_is_right=arguments.clock_is_right)
        logger.info("deleted %d exchanges, %d feedback", pruned.exchanges, pruned.feedback)
    elif arguments.command == "forget":
        _forget(url, arguments)
    else:
        parsed = check_url(url)
        with translate_errors(parsed, InputError):
            changed = migrate_store(parsed)
        logger.info("%s %s", mask_password(parsed), "has been upgraded" if changed else "is up to date")


def _forget(url: str, arguments: argparse.Namespace) -> None:
    """Delete what a person wrote, and name the places where more of it may be."""
    person = _person(arguments)
    assert person is not None
    gone = forget(url, person)
    logger.info("deleted %d exchanges, %d feedback", gone.exchanges, gone.feedback)
    logger.info("not reached, where more may be:")
    for place, fix in NOT_REACHED:
        logger.info("  %s: %s", place, fix)


def _url_of_params() -> str:
    from stages.common.params.loading import load_params

    return load_params().services.events.url


if __name__ == "__main__":
    run_stage(main)
