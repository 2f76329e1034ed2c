"""The served task with the guard: a correction that it rejects becomes no training row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from monitoring.feedback.labels import ServedTask, read_served_task
from services.guard.checks import check_injection, check_secrets, check_toxicity
from stages.common.params.loading import Params


def read_guarded_task(root: Path, params: Params) -> ServedTask:
    """Return the task of the pipeline's newest model, whose corrections the guard looks at.

    Raises:
        InputError: the pipeline has made no model yet.
    """
    return replace(read_served_task(root, params), is_rejected=is_rejected)


def is_rejected(correction: str) -> bool:
    """Return whether the guard rejects a correction, as it would reject it as a prompt."""
    asked = [{"role": "user", "content": correction}]
    found = (check_injection(asked), check_toxicity(asked), check_secrets(correction))
    return not all(decision.allow for decision in found)
