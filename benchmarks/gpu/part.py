"""A part of the benchmark: a process of its own that writes one JSON object.

It is written after each step, so that a part that fails or is ended by its limit keeps what it measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.common.artifacts import write_json
from stages.common.logs import set_quiet_environment

SKIPPED = 77  # the exit code of a part that this machine cannot run; the reason is in its result


Note = Callable[[dict[str, Any]], None]  # writes what has been measured so far


class CannotRun(Exception):
    """Raised where the machine lacks what a part needs; the message says what."""


def run_part(
    doc: str | None,
    measure: Callable[[argparse.Namespace, Note], dict[str, Any]],
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda _: None,
) -> None:
    """Parse the arguments that all parts have, and write what was measured."""
    set_quiet_environment()
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny models, to see that it runs")
    parser.add_argument("--result", type=Path, help="where to write the JSON object; else it is printed")
    add_arguments(parser)
    options = parser.parse_args()

    def note(found: dict[str, Any]) -> None:
        if options.result:
            write_json(options.result, found)

    try:
        result, code = measure(options, note), 0
    except CannotRun as error:
        result, code = {"reason": str(error)}, SKIPPED
    note(result)
    if not options.result:
        print(json.dumps(result, indent=2))
    sys.exit(code)


def need_gpu(tiny: bool) -> Any:
    """Return the device to measure: the GPU, or with tiny models any.

    Raises:
        CannotRun: there is no GPU.
    """
    from stages.common.model.loading import pick_device

    device = pick_device()
    if device.type != "cuda" and not tiny:
        raise CannotRun("torch finds no GPU (torch.cuda.is_available() is false)")
    return device
