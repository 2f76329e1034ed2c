"""Look at production by hand: `perennial watch`.

Judges the windows that have closed since the last look. If they call for a retraining, it follows in this
process, unless `--no-retrain` or `flows.watch.retrain: false` says otherwise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.common.cli import run_command
from flows.common.prefect_api import run_flow
from flows.retrain.__main__ import retrain_now, say
from stages.common.params.loading import load_params

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

    from flows.watch.flow import Watched


def main(arguments: Sequence[str] | None = None) -> int:
    """Look once; return the exit code."""
    parser = argparse.ArgumentParser(prog="perennial watch", description=__doc__)
    parser.add_argument("--no-retrain", action="store_true", help="only say what was found")
    options = parser.parse_args(arguments)
    return run_command(lambda: _watch(Path.cwd(), retrain=not options.no_retrain))


def _watch(root: Path, retrain: bool) -> int:
    load_params(root / "params.yaml")

    def start() -> State[Any]:
        from flows.watch.flow import watch

        return watch(return_state=True)

    watched: Watched = run_flow(root, start)
    for verdict in watched.verdicts:
        sys.stdout.write(f"{verdict.id}  {verdict.summary}\n")
    sys.stdout.write(watched.summary + "\n")
    if retrain and watched.calls_for_retraining is not None:
        say(retrain_now(root, watched.summary, watched.calls_for_retraining, watched.since))
    return 0


if __name__ == "__main__":
    sys.exit(main())
