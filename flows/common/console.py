"""The terminal output of a run: short lines, in one style before and after Prefect is imported."""

from __future__ import annotations

import logging
import os

from stages.common.errors import InputError
from stages.common.logs import set_quiet_environment

# Read by Prefect when it is imported.
PREFECT_ENVIRONMENT = {
    "PREFECT_LOGGING_FORMATTERS_STANDARD_TASK_RUN_FMT": "%(asctime)s  %(task_run_name)-10s  %(message)s",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_FLOW_RUN_FMT": "%(asctime)s  %(message)s",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_FORMAT": "%(asctime)s  %(message)s",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",
    "PREFECT_CLI_PROMPT": "false",
}


def set_up() -> None:
    """Set Prefect's environment variables, unless the user has, and print the log of `flows`."""
    set_quiet_environment()
    for name, value in PREFECT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("flows")
    logger.setLevel(logging.INFO)
    logger.handlers = [handler]
    logger.propagate = False


def hide_links() -> None:
    """Drop Prefect's links to the page of a temporary server, which has none."""
    logging.getLogger("prefect.flow_runs").addFilter(_is_no_link)


def hide_reported_errors() -> None:
    """Drop Prefect's log of errors that the command prints at its end; the server keeps all of them."""
    for handler in logging.getLogger().handlers:  # the terminal's, by now made by Prefect
        handler.addFilter(_is_not_reported_later)


def _is_not_reported_later(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    # A task, a flow: each logs the error it ends with, and then its state, which holds the error as text.
    return not isinstance(error, InputError) and f"{InputError.__name__}: " not in record.getMessage()


def _is_no_link(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("View at ")
