"""The body of every command `python -m flows.NAME`: console set up, errors printed, exit codes.

Exit codes: 0 done; 1 it failed, or bad input; 2 wrong parameters; 130 interrupted.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from flows.common import console
from stages.common.errors import InputError

STOPPED_EXIT_CODE = 128  # plus the number of the signal, as shells have it


def run_command(body: Callable[[], int]) -> int:
    """Run `body` and return its exit code; print user errors to stderr, without a traceback."""
    console.set_up()
    try:
        return body()
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return STOPPED_EXIT_CODE + signal.SIGINT
