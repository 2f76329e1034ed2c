"""What a run writes to the terminal: short lines, one style before and after Prefect is imported."""

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
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
    "PREFECT_CLI_PROMPT": "false",
}


def set_up() -> None:
    """Set what Prefect reads from the environment, unless the user has, and show this package's log."""
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
    """Keep Prefect from pointing to the page of a server that has none."""
    logging.getLogger("prefect.flow_runs").addFilter(_is_no_link)


def tell_errors_once() -> None:
    """Keep Prefect from showing an error that the command tells in words at its end; its page shows all."""
    for handler in logging.getLogger().handlers:  # the terminal's, by now made by Prefect
        handler.addFilter(_is_not_told_yet)


def _is_not_told_yet(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    # A task, a flow: each logs the error it ends with, and then its state, which holds the error as text.
    return not isinstance(error, InputError) and f"{InputError.__name__}: " not in record.getMessage()


def _is_no_link(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("View at ")
