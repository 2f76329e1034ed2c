"""The release flow: a release by hand, from Prefect's page or by its API."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from flows.registry.tracking import Registry
from flows.release.actions import Order
from flows.release.actions import release as make_release
from services.versions.releases import Action, Release
from stages.common.params.loading import load_params


@flow(name="release")
def release(action: Action, reason: str, tag: str | None = None, by: str = "prefect") -> Release:
    """Move the aliases as `perennial release` does, with the same checks.

    Args:
        action: promote, canary, reject, rollback, pin or unpin.
        reason: kept in the journal.
        tag: the version, NAME:VERSION; not needed for rollback, pin and unpin.
        by: name for the journal.
    """
    root = Path.cwd()
    params = load_params(root / "params.yaml")
    share = params.flows.retrain.canary.share
    return make_release(Registry.of(root, params), Order(action, tag, by, reason, share))
