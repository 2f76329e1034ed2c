"""Test production traffic for drift once, by hand: `perennial watch`.

Tests the windows that have closed since the last check. If they trigger a retraining, it runs in
this process, unless `--no-retrain` or `flows.watch.retrain: false` is set.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.common.cli import run_command
from flows.common.prefect_api import run_flow
from flows.retrain.__main__ import print_result, retrain_now
from stages.common.params.loading import load_params

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

    from flows.watch.flow import WatchResult


def main(arguments: Sequence[str] | None = None) -> int:
    """Check once; return the exit code."""
    parser = argparse.ArgumentParser(prog="perennial watch", description=__doc__)
    parser.add_argument("--no-retrain", action="store_true", help="report drift, do not retrain")
    options = parser.parse_args(arguments)
    return run_command(lambda: _watch(Path.cwd(), retrain=not options.no_retrain))


def _watch(root: Path, retrain: bool) -> int:
    load_params(root / "params.yaml")

    def start() -> State[Any]:
        from flows.watch.flow import watch

        return watch(return_state=True)

    result: WatchResult = run_flow(root, start)
    for verdict in result.verdicts:
        sys.stdout.write(f"{verdict.id}  {verdict.summary}\n")
    for problem in result.problems:
        sys.stderr.write(f"warning: {problem}\n")
    sys.stdout.write(result.summary + "\n")
    if retrain and result.retrain_verdict is not None:
        print_result(retrain_now(root, result.summary, result.retrain_verdict, result.since))
    return 0


if __name__ == "__main__":
    sys.exit(main())
