"""Retrain by hand: `perennial retrain --reason "a new product line"`.

Gathers feedback from production, trains a candidate, evaluates it in the gate and in a canary, and promotes
or rejects it. A retraining that was killed is continued.
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

    from flows.retrain.progress import RetrainResult


def main(arguments: Sequence[str] | None = None) -> int:
    """Retrain; return the exit code."""
    parser = argparse.ArgumentParser(prog="perennial retrain", description=__doc__)
    parser.add_argument("--reason", default="by hand", help="reason, for the record")
    options = parser.parse_args(arguments)
    return run_command(lambda: _retrain(Path.cwd(), options.reason))


def _retrain(root: Path, reason: str) -> int:
    load_params(root / "params.yaml")
    print_result(retrain_now(root, reason))
    return 0


def retrain_now(
    root: Path, reason: str, verdict: str | None = None, since: float | None = None
) -> RetrainResult | None:
    """Run the retraining flow in this process; return its result, None if another one is running."""

    def start() -> State[Any]:
        from flows.retrain.flow import retrain

        return retrain(reason=reason, verdict=verdict, since=since, return_state=True)

    result: RetrainResult | None = run_flow(root, start)
    return result


def print_result(result: RetrainResult | None) -> None:
    """Print how a retraining ended."""
    text = (
        "another process is retraining already" if result is None else f"{result.outcome}: {result.summary}"
    )
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
