"""Sweep: `perennial sweep` trains with other values of `finetune`; `--apply` takes the best.

A sweep that was killed is continued. Exit codes: 0 done; 1 bad input, or no trial is complete; 2 wrong
parameters; 130 and 143 stopped.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.common.cli import STOPPED_EXIT_CODE, run_command
from flows.common.prefect_api import run_flow
from flows.init.params_file import edit_params
from flows.sweep.experiments import read_head
from flows.sweep.space import check_space, to_changes
from flows.training import run_lock
from stages.common.artifacts import write_text
from stages.common.params.loading import load_params
from stages.common.params.loop import TriedValues

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

    from flows.sweep.flow import SweepEnd
    from flows.sweep.report import SweepReport

TABLE_COLUMNS = 110


def main(arguments: Sequence[str] | None = None) -> int:
    """Sweep, or apply the best trial; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="perennial sweep",
        description="Train with the values of flows.sweep.space and compare the trainings on the validation "
        "rows. A sweep that was killed is continued.",
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--apply", action="store_true", help="put the values of the best trial into params.yaml; run nothing"
    )
    chosen.add_argument("--new", action="store_true", help="forget the trials of this space, and begin again")
    options = parser.parse_args(arguments)
    root = Path.cwd()
    return run_command(lambda: apply_best(root) if options.apply else _sweep(root, options.new))


def _sweep(root: Path, new: bool) -> int:
    params = load_params(root / "params.yaml")
    check_space(root / "params.yaml", params.flows.sweep.space)
    read_head(root)
    with run_lock.hold(root, wait=False, kind="sweep"):

        def start() -> State[Any]:
            from flows.sweep.flow import sweep

            return sweep(new=new, return_state=True)

        end: SweepEnd = run_flow(root, start)
    if end.report is not None:
        _print_report(end.report)
    if end.stopped_by is not None:
        sys.stderr.write(
            "stopped; the trials that have ended are kept, and the next sweep goes on from there\n"
        )
        return STOPPED_EXIT_CODE + end.stopped_by
    return 0


def _print_report(report: SweepReport) -> None:
    from rich.console import Console

    from flows.sweep.report import PICTURE, TRIALS, build_terminal_table

    columns = max(TABLE_COLUMNS, shutil.get_terminal_size().columns)
    terminal = Console(markup=False, emoji=False, highlight=False, soft_wrap=True, width=columns)
    terminal.print(f"\n{report.count()}\n")
    terminal.print(build_terminal_table(report))
    terminal.print(f"\ntable    {TRIALS}\npicture  {PICTURE}")
    if report.best is not None:
        terminal.print(f"best     trial {report.best.number}; `dvc exp show` lists the complete ones")
        terminal.print("next     perennial sweep --apply && perennial run")


def apply_best(root: Path) -> int:
    """Put the values of the best trial into `params.yaml`; the rest of the file stays as it is.

    Raises:
        InputError: there is no such trial.
        ParamsError: `params.yaml` does not take the values; it stays as it is.
    """
    from flows.sweep.report import format_short, read_best

    path = root / "params.yaml"
    with run_lock.hold(root, wait=True):  # a stage reads params.yaml when it starts
        load_params(path)
        number, values = read_best(root)
        check_space(path, {key: TriedValues(choices=(value,)) for key, value in values.items()})
        text = path.read_text(encoding="utf-8")
        write_text(path, edit_params(text, to_changes(values)))
    shown = ", ".join(f"{key}: {format_short(value)}" for key, value in values.items())
    sys.stdout.write(
        f"params.yaml has the values of trial {number}: {shown}\n"
        "next: perennial run (DVC has the training in its cache), or perennial retrain\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
