"""The release flow: a release made by hand, from Prefect's page or by its API."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from flows.release.actions import Action
from flows.release.actions import release as make_release
from flows.release.journal import ReleaseRecord
from stages.common.params.loading import load_params


@flow(name="release")
def release(action: Action, why: str, tag: str | None = None, by: str = "prefect") -> ReleaseRecord:
    """Move the aliases as `python -m flows.release` does, and with the same refusals.

    Args:
        action: promote, try, refuse, roll_back, pin or unpin.
        why: the reason, kept for good.
        tag: the version, NAME:VERSION; not needed to roll back, pin and unpin.
        by: who asks for it.
    """
    root = Path.cwd()
    return make_release(root, load_params(root / "params.yaml"), action, tag, by, why)
