"""Retrain by hand: `perennial retrain --why "a new product line"`.

Gathers what production taught, trains a candidate, holds it to the gate, shows it to some users, and
promotes or refuses it. One that was killed is taken up where it stood.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.common.cli import run_command
from flows.common.prefect_api import run_flow
from stages.common.params.loading import load_params

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

    from flows.retrain.progress import Ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Retrain; return the exit code."""
    parser = argparse.ArgumentParser(prog="perennial retrain", description=__doc__)
    parser.add_argument("--why", default="by hand", help="for the record")
    options = parser.parse_args(arguments)
    return run_command(lambda: _retrain(Path.cwd(), options.why))


def _retrain(root: Path, why: str) -> int:
    load_params(root / "params.yaml")
    say(retrain_now(root, why))
    return 0


def retrain_now(root: Path, why: str, verdict: str | None = None, since: float | None = None) -> Ended | None:
    """Run the retraining flow in this process; return how it ended, None if another one is at work."""

    def start() -> State[Any]:
        from flows.retrain.flow import retrain

        return retrain(why=why, verdict=verdict, since=since, return_state=True)

    ended: Ended | None = run_flow(root, start)
    return ended


def say(ended: Ended | None) -> None:
    """Say on stdout how a retraining ended."""
    said = "another process retrains already" if ended is None else f"{ended.outcome}: {ended.said}"
    sys.stdout.write(said + "\n")


if __name__ == "__main__":
    sys.exit(main())
