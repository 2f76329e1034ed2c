"""Releases: the only code that moves the aliases `champion` and `challenger`.

A release takes a lock, checks that it is allowed (the gate's verdict on this version against this champion,
the bake period, the pin), and replaces the alias file by one rename. That rename is the release: before it
nothing has happened, after it everything has. The journal line and MLflow's aliases follow from the file. A
kill, or an MLflow that is down, leaves them behind by one release at most, and the next `settle` (every
release, retraining and watch calls it) brings them up to date.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from flows.gate import verdict as gate
from flows.registry.model_versions import push_aliases
from flows.registry.tracking import Registry
from services.versions import store
from services.versions.aliases import (
    ALIASES,
    HISTORY,
    Aliases,
    Challenger,
    Mode,
    read_aliases,
    write_aliases,
)
from services.versions.releases import Action, Release, append_release, read_releases
from stages.common.artifacts import STATE, read_json
from stages.common.errors import InputError
from stages.common.locks import hold_lock
from stages.common.tag import Tag

LOCK = STATE / "release.lock"

logger = logging.getLogger("flows.release")


@dataclass(frozen=True, slots=True)
class Order:
    """What a person or a flow asks for.

    Attributes:
        tag: the version; for a rollback the champion to leave (None: the present one); None for pins.
        by: a person's name, or the flow that decided; reason: kept in the journal.
        share, mode: of a canary: the share of the users, and whether they get the challenger's answers or it
            is asked the same in the shadow.
        first: promote without the gate's verdict; allowed only while there is no champion.
    """

    action: Action
    tag: str | None
    by: str
    reason: str
    share: float = 0.0
    mode: Mode = "canary"
    first: bool = False


def release(registry: Registry, order: Order) -> Release:
    """Move the aliases of a checkout; an order that was carried out already changes nothing.

    Returns:
        The release that was made, now or before.

    Raises:
        InputError: the version has no verdict, was rejected, was judged against another champion, or is not
            in the store; the champion is pinned; or there is no former champion. Nothing has moved then.
    """
    root = registry.root
    if order.action not in CHANGES:
        raise InputError(f"{order.action!r} is not a release", f"use one of {', '.join(CHANGES)}")
    if not order.reason.strip():
        raise InputError(f"{order.action} needs a reason, which the journal keeps", "--reason TEXT")
    with hold_lock(root / LOCK):
        before = _complete_journal(root)
        made = _find_earlier(root, before, order)
        if made is None:
            made = _carry_out(root, before, order)
        _push(registry)
        return made


def promote_first(registry: Registry, follow_pipeline: bool, by: str) -> None:
    """Promote the version that is served before the first release, if there is no champion.

    There is nothing to compare it with, so the gate is not asked. From then on a restarted service no longer
    follows the pipeline: call this before a pipeline run whose model must pass the gate.

    Raises:
        InputError: there is no model yet.
    """
    if read_aliases(registry.root / ALIASES).champion is not None:
        return
    tag = store.find_served(registry.model, follow_pipeline, registry.root)
    release(
        registry, Order("promote", tag, by, "the first model: no champion to compare it with", first=True)
    )


def settle(registry: Registry) -> None:
    """Bring the journal and MLflow's aliases up to date with the alias file; a down MLflow is logged."""
    with hold_lock(registry.root / LOCK):
        _complete_journal(registry.root)
        _push(registry)


def _complete_journal(root: Path) -> Aliases:
    """Return the aliases; a kill may have kept the line of their release from the journal."""
    aliases = read_aliases(root / ALIASES)
    if aliases.release is not None:
        append_release(root, aliases.release)
    return aliases


def _push(registry: Registry) -> None:
    """Make MLflow's aliases those of the file."""
    aliases = read_aliases(registry.root / ALIASES)
    if aliases.release is None:
        return
    challenger = aliases.challenger.tag if aliases.challenger else None
    try:
        push_aliases(registry, {"champion": aliases.champion, "challenger": challenger})
    except InputError as error:
        logger.warning("MLflow's aliases are out of date until the next watch or release: %s", error)


def _find_earlier(root: Path, aliases: Aliases, order: Order) -> Release | None:
    """Return the release that carried the order out already: a caller that was killed asks again."""
    tag, challenger = order.tag, aliases.challenger.tag if aliases.challenger else None
    done = {
        "promote": tag is not None and aliases.champion == tag,
        "canary": tag is not None and challenger == tag,
        "reject": challenger != tag,
        "rollback": tag is not None and aliases.champion != tag,
    }.get(order.action, False)
    if not done:
        return None
    moves = [one for one in read_releases(root) if one.action not in ("pin", "unpin") and one.tag == tag]
    return moves[-1] if moves and moves[-1].action == order.action else None


def _carry_out(root: Path, before: Aliases, order: Order) -> Release:
    if before.pinned is not None and order.action in ("promote", "canary", "rollback"):
        raise InputError(
            f"the champion {before.champion} is pinned: {before.pinned}",
            "perennial release unpin --reason TEXT",
        )
    at = time.time()
    after = CHANGES[order.action](root, before, order, at)
    about_champion = order.action in ("rollback", "pin", "unpin")
    made = Release(
        id=uuid.uuid4().hex,
        at=at,
        action=order.action,
        tag=str(before.champion if about_champion else order.tag),
        by=order.by,
        reason=order.reason,
        champion=after.champion,
        challenger=after.challenger.tag if after.challenger else None,
        former=before.champion,
    )
    write_aliases(root / ALIASES, replace(after, release=made))
    append_release(root, made)
    logger.info("%s: champion %s, challenger %s", made.action, made.champion, made.challenger)
    return made


def _promote(root: Path, before: Aliases, order: Order, at: float) -> Aliases:
    tag = _require_tag(order)
    if before.champion == tag:
        raise InputError(f"{tag} is already the champion", "nothing to do")
    if order.first:
        if before.champion is not None:
            raise InputError(
                f"{before.champion} is the champion: {tag} would not be the first",
                f"judge it: perennial gate {tag}, then promote it without --first",
            )
        store.get_version(tag)
        store.check_parity(tag, root)
        return Aliases(tag, champion_since=store.read_stored_at(tag))
    _check_gate(root, tag, before.champion)
    _check_canary(root, tag, before.challenger)
    history = (*before.history, before.champion)[-HISTORY:] if before.champion else before.history
    return Aliases(tag, None, history, champion_since=at, replaced=before.champion)


def _start_canary(root: Path, before: Aliases, order: Order, at: float) -> Aliases:
    tag = _require_tag(order)
    if before.champion is None:
        raise InputError("there is no champion to compare with", "promote the first model")
    if before.champion == tag:
        raise InputError(f"{tag} is the champion", "choose another version as challenger")
    _check_gate(root, tag, before.champion)
    return replace(before, challenger=Challenger(tag, order.share, order.mode, at))


def _reject(root: Path, before: Aliases, order: Order, at: float) -> Aliases:
    tag = _require_tag(order)
    if before.champion == tag:
        raise InputError(f"{tag} is the champion", "replace it: perennial release rollback --reason TEXT")
    in_canary = before.challenger is not None and before.challenger.tag == tag
    return replace(before, challenger=None) if in_canary else before


def _rollback(root: Path, before: Aliases, order: Order, at: float) -> Aliases:
    """Return the aliases with the last former champion that is still in the store."""
    if order.tag is not None and before.champion != order.tag:
        raise InputError(
            f"{order.tag} is not the champion, {before.champion} is", "name the champion, or no version"
        )
    if not before.history:
        raise InputError(
            f"there is no former champion to replace {before.champion}",
            "train a new version, or promote one that passed the gate",
        )
    *earlier, former = before.history
    store.get_version(former)
    # A challenger was judged against the champion that is leaving: its verdict no longer holds.
    return Aliases(former, None, tuple(earlier), champion_since=at)


def _pin(root: Path, before: Aliases, order: Order, at: float) -> Aliases:
    if before.champion is None:
        raise InputError("there is no champion to pin", "promote a version first")
    return replace(before, pinned=order.reason)


def _unpin(root: Path, before: Aliases, order: Order, at: float) -> Aliases:
    if before.champion is None:
        raise InputError("there is no champion to unpin", "promote a version first")
    return replace(before, pinned=None)


CHANGES: dict[Action, Callable[[Path, Aliases, Order, float], Aliases]] = {
    "promote": _promote,
    "canary": _start_canary,
    "reject": _reject,
    "rollback": _rollback,
    "pin": _pin,
    "unpin": _unpin,
}


def _require_tag(order: Order) -> str:
    if not order.tag:
        raise InputError(f"{order.action} needs a version", "name it: NAME:VERSION")
    return order.tag


def _check_gate(root: Path, tag: str, champion: str | None) -> None:
    """Check that the gate passed this version against this champion, on evidence that is unchanged.

    Raises:
        InputError: it did not; or the version is not in the store, or parity rejected it.
    """
    judge_it = f"judge it: perennial gate {tag}"
    verdict = gate.read_verdict(root, tag)
    if verdict is None:
        raise InputError(f"the gate has not judged {tag}", judge_it)
    if not verdict.passed:
        failed = "".join(f"\n  {criterion.name}: {criterion.summary}" for criterion in verdict.failures)
        raise InputError(f"the gate rejected {tag}{failed}", f"see {Tag.parse(tag).report('gate')}")
    if verdict.champion != champion:
        raise InputError(
            f"{tag} was judged against {verdict.champion or 'its base model'}, and the champion is "
            f"{champion or 'none'}",
            judge_it,
        )
    if changed := gate.find_changed_files(root, verdict):
        raise InputError(
            f"the evidence of the verdict on {tag} has changed since: {', '.join(changed)}", judge_it
        )
    store.get_version(tag)
    store.check_parity(tag, root)


def _check_canary(root: Path, tag: str, challenger: Challenger | None) -> None:
    """Check that the version's last canary, if it had one, did not find it worse.

    Raises:
        InputError: it did.
    """
    path = root / Tag.parse(tag).report("canary")
    found = read_json(path).get("canary") if path.exists() else None
    newer = found and challenger and challenger.tag == tag and challenger.since != found["since"]
    if found and found["state"] == "bad" and not newer:
        raise InputError(
            f"{tag} was worse in its canary: {found['summary']}",
            "reject it, or run another canary: perennial release canary",
        )
