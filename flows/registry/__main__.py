"""Register the newest pipeline run in MLflow, or restore a version from there: `perennial registry`.

perennial registry register
perennial registry restore NAME:VERSION
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flows.common.cli import run_command
from flows.registry.restore import restore
from flows.registry.runs import register_candidate, verify_candidate
from flows.registry.tracking import Registry
from stages.common.params.loading import load_params


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    options = _parser().parse_args(arguments)
    return run_command(
        lambda: _register(options.trigger) if options.command == "register" else _restore(options.tag)
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="perennial registry", description="Log a run in MLflow, or restore a version from it."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    register = commands.add_parser("register", help="log the newest pipeline run, and register its adapter")
    register.add_argument("--trigger", default="hand", help="what started the training, for the run's tags")
    restoring = commands.add_parser("restore", help="restore a version that the model store has lost")
    restoring.add_argument("tag", help="NAME:VERSION, as on MLflow's page and in the journal of releases")
    return parser


def _register(trigger: str) -> int:
    params = load_params()
    registry = Registry.of(Path(), params)
    candidate = register_candidate(registry, params, trigger)
    verify_candidate(registry, candidate)
    sys.stdout.write(f"{candidate.tag}: version {candidate.model_version}, run {candidate.run_id}\n")
    return 0


def _restore(tag: str) -> int:
    restored = restore(Registry.of(Path(), load_params()), tag)
    sys.stdout.write(f"{restored} is in the store\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
