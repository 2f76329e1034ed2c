"""Format tracebacks for the log of the service without the contents of a request.

The message of most exceptions may quote what a user sent: a key that is not in a dict, a value that is no
number, the parameters of a statement. What the machine itself reports (no memory, no file, a failed kernel)
stays.
"""

from __future__ import annotations

import logging
import traceback
from typing import Any

from stages.common.errors import InputError

# The messages of these come from the system, from a library's kernel or from us.
TOLD = (OSError, MemoryError, RuntimeError, InputError)
HIDDEN = "(its message is not logged: it may hold what a user wrote)"


def hide_messages() -> None:
    """Let every log record of this process format its exception by `format_exception`."""
    make_record = logging.getLogRecordFactory()
    if getattr(make_record, "hides_messages", False):
        return

    def make_hiding(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = make_record(*arguments, **options)
        if isinstance(record.exc_info, tuple) and isinstance(error := record.exc_info[1], BaseException):
            record.exc_text = format_exception(error)
            record.exc_info = None
        return record

    make_hiding.hides_messages = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make_hiding)


def format_exception(error: BaseException) -> str:
    """Return the traceback of an exception and of those that caused it, the first one first."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return "\n".join(_format_one(one) for one in reversed(chain))


def _format_one(error: BaseException) -> str:
    kind = type(error)
    shown = isinstance(error, TOLD) and not isinstance(error, UnicodeError | RecursionError)
    message = str(error) if shown else HIDDEN
    frames = "".join(traceback.format_tb(error.__traceback__))
    return f"Traceback (most recent call last):\n{frames}{kind.__module__}.{kind.__qualname__}: {message}"
