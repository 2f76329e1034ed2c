"""Turn feedback into rows of the served task; the guard checks each correction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from monitoring.feedback.labels import ServedTask, read_served_task
from monitoring.feedback.rows import Labelled, label_rows, read_held_out_before
from services.guard.policy import check_correction
from stages.common.params.loading import Params
from stages.common.params.services import Guard

# What the service does not ask of a request is asked before a row is learned all the same.
EVERY_CHECK = {"prompt_injection": "record", "toxicity": "record", "secrets": "record"}


def read_guarded_task(root: Path, params: Params) -> ServedTask:
    """Return the task of the pipeline's newest model, whose corrections the guard looks at.

    Raises:
        InputError: the pipeline has made no model yet.
    """
    settings = params.services.guard.model_copy(update=EVERY_CHECK)
    return replace(
        read_served_task(root, params), is_rejected=lambda correction: is_rejected(correction, settings)
    )


def label_traffic(root: Path, params: Params, start: float, end: float) -> Labelled:
    """Return the rows that feedback on the exchanges received in [start, end) (unix s) becomes.

    Raises:
        InputError: the event store cannot be read, or the pipeline has made no model yet.
    """
    url, settings = params.services.events.url, params.monitoring.feedback
    return label_rows(url, start, end, settings, read_guarded_task(root, params), read_held_out_before(root))


def is_rejected(correction: str, settings: Guard) -> bool:
    """Return whether a check that is not off finds a correction suspicious, enforced or recorded."""
    return not all(result.decision.allow for result in check_correction(correction, (), settings))
