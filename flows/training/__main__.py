"""Run the training flow: bring the model, its evaluation and its card up to date.

`perennial run` runs what changed since the last run, and nothing else; this is what
`make run` calls. The parameters are checked, the lock is taken and the plan is made before Prefect
is imported, so that a mistake is reported at once.

Exit codes: 0 done; 1 a stage failed, or bad input; 2 wrong parameters; 130 and 143 stopped.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from flows.common import console
from flows.common.cli import STOPPED_EXIT_CODE, run_command
from stages.common.errors import ParamsError
from stages.common.params.loading import load_params

if TYPE_CHECKING:
    from types import FrameType

    from flows.training.stage_tasks import PipelineResult, StageFailure

RESULT_COLUMNS = 100


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the training flow from the command line; return the exit code."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _terminate)
    return run_command(lambda: _run(Path.cwd(), options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="perennial run",
        description="Run the stages of dvc.yaml that changed, as a Prefect flow, and show the result. "
        "`dvc repro` gives the same files without Prefect.",
    )
    parser.add_argument("--force", action="store_true", help="run every stage, changed or not")
    parser.add_argument(
        "--until", metavar="STAGE", help="run this stage and those it depends on, and no later one"
    )
    parser.add_argument(
        "--task",
        metavar="NAME",
        help="first put params.NAME.yaml in the place of params.yaml; default: that of the last commit",
    )
    parser.add_argument(
        "--no-wait", action="store_true", help="fail instead of waiting for another run in this checkout"
    )
    return parser


def _run(root: Path, options: argparse.Namespace) -> int:
    started = time.monotonic()
    if options.task is None:
        load_params(root / "params.yaml")
    from flows.common import prefect_api
    from flows.training.prepared_run import prepare_run

    with ExitStack() as stack:
        # The lock comes first: the server belongs to the run, and is cleaned up with it.
        run = stack.enter_context(
            prepare_run(
                root, force=options.force, until=options.until, wait=not options.no_wait, task=options.task
            )
        )
        api = stack.enter_context(prefect_api.connect(root))
        run.start_early()
        from flows.training.flow import training
        from flows.training.stage_tasks import PipelineResult

        api.wait()
        if api.is_temporary:
            console.hide_links()
        state = training.with_options(flow_run_name=prefect_api.make_literal_name(run.name))(
            force=options.force, until=options.until, return_state=True
        )
        stopped_by = run.processes.stopped_by
        prefect_api.flush()
    if stopped_by is not None:
        sys.stderr.write("stopped; finished stages are kept, and the next run goes on from there\n")
        return STOPPED_EXIT_CODE + stopped_by
    result = state.result(raise_on_failure=False)
    if not isinstance(result, PipelineResult):
        sys.stderr.write(f"error: the flow ended {state.name}: {state.message}\n")
        return 1
    if result.failures:
        return _show_failures(result.failures, result.not_run)
    _show_result(root, run.name, result, time.monotonic() - started)
    return 0


def _show_failures(failures: Sequence[StageFailure], not_run: Sequence[str]) -> int:
    for failure in failures:
        sys.stderr.write(f"\nerror: {failure.stage} failed: {failure.message}\n")
    if not_run:
        sys.stderr.write(f"not run: {', '.join(not_run)}\n")
    sys.stderr.write("finished stages are kept; the next run goes on from there\n")
    return 2 if any(failure.exit_code == ParamsError.exit_code for failure in failures) else 1


def _show_result(root: Path, name: str, result: PipelineResult, seconds: float) -> None:
    from rich.console import Console
    from rich.text import Text

    from flows.common import summary

    # A narrower table would cut its figures off; a log has 80 columns by default.
    columns = max(RESULT_COLUMNS, shutil.get_terminal_size().columns)
    # A name may hold what looks like rich's markup or an emoji's code.
    terminal = Console(markup=False, emoji=False, highlight=False, soft_wrap=True, width=columns)
    counts = {"ran": result.ran, "restored": result.restored, "unchanged": result.unchanged}
    summarised = ", ".join(f"{len(stages)} {how}" for how, stages in counts.items() if stages)
    terminal.print(Text.assemble("\n", (name, "bold"), f": {summarised}, in {_duration(seconds)}\n"))
    if results := summary.read_results(root):
        terminal.print(summary.build_terminal_table(results))
        terminal.print("intervals from the test rows; p of a paired test", style="dim")
        terminal.print(f"{summary.read_resolution(root)}\n", style="dim")
    where = {"card": summary.get_card_path(root), "metrics": root / "reports" / "evaluate" / "metrics.json"}
    for what, path in where.items():
        if path.exists():
            terminal.print(f"{what:<8} {path.relative_to(root)}")
    terminal.print("serve    make serve")
    terminal.print("next     change a line of params.yaml or put your own rows under data/, then run again")
    terminal.print("         `make up` serves it, watches its traffic and keeps it fresh")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(STOPPED_EXIT_CODE + signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
