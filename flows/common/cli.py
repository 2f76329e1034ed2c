"""What the commands `python -m flows.NAME` have in common: a Prefect API, errors in words, exit codes.

Exit codes: 0 done; 1 it failed, or bad input; 2 wrong parameters; 130 stopped.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.common import console
from stages.common.errors import InputError

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

STOPPED_EXIT_CODE = 128  # plus the number of the signal, as shells have it


def in_words(body: Callable[[], int]) -> int:
    """Call `body` and return its exit code; what the user can mend is told on stderr, with the fix."""
    console.set_up()
    try:
        return body()
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return STOPPED_EXIT_CODE + signal.SIGINT


def run_flow(root: Path, start: Callable[[], State[Any]]) -> Any:
    """Run a flow against the Prefect API that there is, or one for this run; return its result.

    Args:
        start: imports a flow and runs it with `return_state=True`; importing while the API starts saves time.

    Raises:
        InputError: of the flow, or because no API comes up.
        RuntimeError: the flow ended otherwise than completed, without a reason of its own.
    """
    from flows.common import prefect_api

    with prefect_api.reachable(root) as api:
        console.tell_errors_once()
        api.wait()
        if api.is_temporary:
            console.hide_links()
        state = start()
        prefect_api.flush()
    result = state.result(raise_on_failure=False)
    if isinstance(result, BaseException):
        raise result
    if not state.is_completed():
        raise InputError(f"the flow ended {state.name}: {state.message}", "see above; the next run goes on")
    return result
