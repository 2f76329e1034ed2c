"""Show the training rows that feedback would become: `perennial feedback`.

The guard looks at corrections as it does for a retraining. `--write` writes the rows, too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from flows.common.cli import run_command
from flows.common.guarded_task import label_traffic
from monitoring.feedback import rows
from stages.common.params.loading import load_params


def main(arguments: Sequence[str] | None = None) -> int:
    """Show the rows that the feedback in the event store would become; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="perennial feedback", description="Show the training rows that feedback would become."
    )
    written = f"{rows.ROWS}, {rows.HELD_OUT} and {rows.REPORT}"
    parser.add_argument("--write", action="store_true", help=f"also write {written}")
    options = parser.parse_args(arguments)
    return run_command(lambda: _show(Path.cwd(), options.write))


def _show(root: Path, write: bool) -> int:
    params = load_params(root / "params.yaml")
    labelled = label_traffic(root, params, 0.0, time.time())
    sys.stdout.write(rows.format_report(labelled.report))
    if write:
        rows.write_labelled(root, labelled)
    return 0


if __name__ == "__main__":
    sys.exit(main())
