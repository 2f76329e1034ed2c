"""Judge a candidate: `perennial gate NAME:VERSION`.

Judges the pipeline's newest model; the aliases do not move. Exit code 1: rejected.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flows.common.cli import run_command
from flows.gate.judge import run_gate
from flows.gate.verdict import format_verdict
from stages.common.params.loading import load_params


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge the pipeline's newest model and print the verdict; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="perennial gate", description="Judge the pipeline's newest model; the aliases do not move."
    )
    parser.add_argument("tag", help="NAME:VERSION of the pipeline's newest model")
    options = parser.parse_args(arguments)

    def judge() -> int:
        verdict = run_gate(Path.cwd(), load_params(), options.tag)
        sys.stdout.write(format_verdict(verdict))
        return 0 if verdict.passed else 1

    return run_command(judge)


if __name__ == "__main__":
    sys.exit(main())
