"""Releases: the one way in which the aliases `champion` and `challenger` move.

    python -m flows.release status
    python -m flows.release try TAG --why TEXT        # some users get its answers
    python -m flows.release promote TAG --why TEXT    # all do
    python -m flows.release refuse TAG --why TEXT     # its trial ends
    python -m flows.release rollback [TAG] --why TEXT # the former champion again, in the place of TAG
    python -m flows.release pin --why TEXT            # nothing takes the champion's place until unpin
    python -m flows.release unpin --why TEXT

`release` holds a lock, so that two take turns; it moves only what the gate let through, and refuses a verdict
on another champion than the present one. Two places must agree: the file that the service follows and the
registry. So what is intended is written down first (`flows.release.journal`); after a kill the next call
finishes it, or takes it back where the gate's verdict is gone. `.perennial/releases.jsonl` keeps them all.
"""

from __future__ import annotations

import argparse
import getpass
import logging
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from flows.common.cli import run_command
from flows.gate import judge
from flows.registry import model_versions
from flows.release.journal import (
    INTENT,
    Intent,
    ReleaseRecord,
    append_release,
    done_releases,
    read_intent,
    read_releases,
    remove_intent,
    trial_record,
    write_intent,
)
from services.versions import __main__ as versions
from services.versions.__main__ import ALIASES, HISTORY, Aliases, Challenger, check_parity, read_aliases
from stages.common.artifacts import STATE, read_json, reports, write_json
from stages.common.errors import InputError
from stages.common.locks import file_lock
from stages.common.params.loading import Params, load_params

LOCK = STATE / "release.lock"
PIN = STATE / "pin.json"
CANARY = reports("canary")

Action = Literal["promote", "try", "refuse", "roll_back", "pin", "unpin"]
ACTIONS: tuple[Action, ...] = ("promote", "try", "refuse", "roll_back", "pin", "unpin")
# To a version that was champion before anything was recorded the registry cannot point.
MAY_BE_UNRECORDED = ("adopt", "roll_back")

logger = logging.getLogger("flows.release")


def release(root: Path, params: Params, action: Action, tag: str | None, by: str, why: str) -> ReleaseRecord:
    """Move the aliases, or refuse to; a call that was carried out already changes nothing.

    Args:
        tag: the version; for roll_back the champion to go back from (None: whoever it is); None for pins.
        by: who asks for it; why: in words, kept for good.

    Returns:
        What was done, or the record of when it was done.

    Raises:
        InputError: the version was never judged, was refused, was judged against another champion, or is not
            in the store; the champion is pinned; there is no former champion; or the registry cannot be
            reached. Nothing has moved then.
    """
    if action not in ACTIONS:
        raise InputError(f"{action!r} is no release", f"one of {', '.join(ACTIONS)}")
    if not why.strip():
        raise InputError(
            f"no reason is given for {action}", "say it, for those who read it later: --why TEXT"
        )
    with file_lock(root / LOCK):
        _recover(root, params)
        _adopt(root, params)
        known = _done_already(root, action, tag)
        if known is not None:
            return known
        return _carry_out(root, params, _intent(root, params, action, tag, by, why))


def recover(root: Path, params: Params) -> ReleaseRecord | None:
    """Finish or take back a release that was killed; None if there is none.

    Raises:
        InputError: the registry cannot be reached.
    """
    if not (root / INTENT).exists():
        return None
    with file_lock(root / LOCK):
        return _recover(root, params)


def adopt(root: Path, params: Params) -> ReleaseRecord | None:
    """Take over the champion that was set before there were releases; None if that is done, or nobody is.

    From then on the service does not follow the pipeline by itself. Call it before a pipeline run whose
    result shall not be served without the gate.

    Raises:
        InputError: the registry cannot be reached.
    """
    with file_lock(root / LOCK):
        _recover(root, params)
        return _adopt(root, params)


def pin_reason(root: Path) -> str | None:
    """Return why the champion is pinned, or None."""
    path = root / PIN
    return str(read_json(path)["why"]) if path.exists() else None


def gated(root: Path, tag: str) -> bool:
    """Return whether the gate let a version through, whatever champion it was judged against."""
    verdict = judge.read_verdict(root, tag)
    return verdict is not None and verdict.passed


def _done_already(root: Path, action: Action, tag: str | None) -> ReleaseRecord | None:
    """Return the record of a release that a killed caller asks for a second time."""
    aliases = read_aliases(root / ALIASES)
    there = {
        "promote": tag is not None and aliases.champion == tag,
        "try": aliases.challenger is not None and aliases.challenger.tag == tag,
        "refuse": aliases.challenger is None or aliases.challenger.tag != tag,
        "roll_back": tag is not None and aliases.champion != tag,
    }.get(action, False)
    if not there:
        return None
    moves = [r for r in done_releases(root) if r.action in ("promote", "roll_back", "try", "refuse")]
    last = next((record for record in reversed(moves) if record.tag == tag), None)
    return last if last is not None and last.action == action else None


def _intent(root: Path, params: Params, action: Action, tag: str | None, by: str, why: str) -> Intent:
    """Check that a release may be, and return what it changes."""
    before, pinned = read_aliases(root / ALIASES), pin_reason(root)
    pin_after = pinned
    if action in ("pin", "unpin"):
        after, pin_after = before, why if action == "pin" else None
        tag = before.champion
        if tag is None:
            raise InputError("there is no champion to pin", "promote one first")
    elif action == "refuse":
        tag = _named(action, tag)
        on_trial = before.challenger is not None and before.challenger.tag == tag
        if before.champion == tag:
            raise InputError(
                f"{tag} is the champion", "python -m flows.release rollback --why TEXT goes back from it"
            )
        after = replace(before, challenger=None) if on_trial else before
    else:
        if pinned is not None:
            raise InputError(
                f"the champion {before.champion} is pinned: {pinned}",
                "python -m flows.release unpin --why TEXT",
            )
        if action == "roll_back":
            after = _back(root, before, tag)
            tag = before.champion
        else:
            tag = _named(action, tag)
            _check_gate(root, tag, before.champion)
            if action == "promote":
                _check_trial(root, tag)
                after = _promoted(before, tag)
            else:
                after = _tried(before, tag, params.flows.retrain.canary.share)
    after = replace(after, managed=True)
    record = ReleaseRecord(
        id=uuid.uuid4().hex,
        at=time.time(),
        action=action,
        tag=tag,
        by=by,
        why=why,
        champion=after.champion,
        challenger=after.challenger.tag if after.challenger else None,
        former=before.champion,
    )
    return Intent(record, before, after, (pinned, pin_after))


def _named(action: Action, tag: str | None) -> str:
    if not tag:
        raise InputError(f"{action} of which version?", "name it: NAME:VERSION")
    return tag


def _check_gate(root: Path, tag: str, champion: str | None) -> None:
    """Refuse what the gate did not let through against the present champion.

    Raises:
        InputError: it says why.
    """
    judge_it = f"judge it: python -m flows.gate {tag}"
    verdict = judge.read_verdict(root, tag)
    if verdict is None:
        raise InputError(f"{tag} was never judged", judge_it)
    if not verdict.passed:
        failed = "".join(f"\n  {criterion.name}: {criterion.said}" for criterion in verdict.failures)
        raise InputError(f"the gate refused {tag}{failed}", f"see {judge.verdict_path(tag)}")
    if verdict.champion != champion:
        raise InputError(
            f"{tag} was judged against {verdict.champion or 'its base alone'}, and the champion is "
            f"{champion or 'nobody'}",
            judge_it,
        )
    if changed := judge.changed_files(root, verdict):
        raise InputError(
            f"the evidence of the verdict on {tag} is not what it was: {', '.join(changed)}", judge_it
        )
    versions.stored(tag)
    check_parity(tag, root)


def _check_trial(root: Path, tag: str) -> None:
    """Refuse to promote what its trial spoke against."""
    path = root / CANARY / f"{tag.rpartition(':')[2]}.json"
    trial = read_json(path).get("canary") if path.exists() else None
    begun = trial_record(root, tag)
    if trial and begun and trial["since"] == begun.at and trial["state"] == "bad":
        raise InputError(
            f"{tag} was worse on trial: {trial['said']}",
            "refuse it, or try it anew and see: flows.release try",
        )


def _promoted(before: Aliases, tag: str) -> Aliases:
    if before.champion == tag:
        raise InputError(f"{tag} is the champion", "there is nothing to do")
    history = (*before.history, before.champion)[-HISTORY:] if before.champion else before.history
    return Aliases(tag, None, history)


def _tried(before: Aliases, tag: str, share: float) -> Aliases:
    if before.champion is None:
        raise InputError("there is no champion to compare with", "promote the first model")
    if before.champion == tag:
        raise InputError(f"{tag} is the champion", "a challenger is another version")
    return replace(before, challenger=Challenger(tag, share, "canary"))


def _back(root: Path, before: Aliases, tag: str | None) -> Aliases:
    """Return the aliases with the last former champion that may be served again."""
    if tag is not None and before.champion != tag:
        raise InputError(f"{tag} is not the champion, {before.champion} is", "name the champion, or nobody")
    adopted = {record.champion for record in read_releases(root) if record.action == "adopt"}
    for place in range(len(before.history) - 1, -1, -1):
        former = before.history[place]
        if former != before.champion and (former in adopted or gated(root, former)):
            versions.stored(former)
            # A challenger was judged against the champion that goes: its verdict is stale.
            return Aliases(former, None, before.history[:place])
    raise InputError(
        f"no version was champion before {before.champion} that the gate let through",
        "train another one, or promote one that the gate has judged",
    )


def _adopt(root: Path, params: Params) -> ReleaseRecord | None:
    before = read_aliases(root / ALIASES)
    if before.managed or before.champion is None:
        return None
    # A trial that was set by hand was never judged.
    after = replace(before, challenger=None, managed=True)
    why = "was champion before there were releases"
    record = ReleaseRecord(
        uuid.uuid4().hex, time.time(), "adopt", before.champion, "release", why, before.champion, None, None
    )
    pinned = pin_reason(root)
    return _carry_out(root, params, Intent(record, before, after, (pinned, pinned)))


def _carry_out(root: Path, params: Params, intent: Intent) -> ReleaseRecord:
    """Write the intent down, move, and note it; what fails half-way is taken back."""
    write_intent(root, intent)
    try:
        _finish(root, params, intent)
    except Exception as error:
        if intent.record.action == "roll_back" and read_aliases(root / ALIASES) == intent.after:
            # The service is back already, which is what matters.
            logger.error(
                "the service is back at %s; the registry is to follow with the next release: %s",
                intent.after.champion,
                error,
            )
            return intent.record
        intent = replace(intent, back=True)
        write_intent(root, intent)
        try:
            _finish(root, params, intent)
        except Exception as again:
            logger.error("%s is taken back by the next release: %s", intent.record.action, again)
        raise
    logger.info(
        "%s: champion %s, challenger %s",
        intent.record.action,
        intent.record.champion,
        intent.record.challenger,
    )
    return intent.record


def _recover(root: Path, params: Params) -> ReleaseRecord | None:
    intent = read_intent(root)
    if intent is None:
        return None
    record = intent.record
    if not intent.back and record.action in ("promote", "try"):
        try:
            _check_gate(root, str(record.tag), intent.before.champion)
        except InputError as error:
            logger.warning("a killed release is taken back: %s", error)
            intent = replace(intent, back=True)
            write_intent(root, intent)
    _finish(root, params, intent)
    outcome = "taken back" if intent.back else "finished"
    logger.warning("the last release (%s of %s) was broken off; it is %s", record.action, record.tag, outcome)
    return intent.outcome


def _finish(root: Path, params: Params, intent: Intent) -> None:
    """Bring everything to where the intent leads; every step can be done again."""
    for step in _steps(root, params, intent):
        step()


def _steps(root: Path, params: Params, intent: Intent) -> Iterator[Callable[[], None]]:
    aliases = intent.before if intent.back else intent.after
    pin = intent.pin[0] if intent.back else intent.pin[1]
    may_lack = intent.back or intent.record.action in MAY_BE_UNRECORDED
    in_registry: list[Callable[[], None]] = [
        lambda: _point(root, params, "champion", aliases.champion, may_lack),
        lambda: _point(
            root, params, "challenger", aliases.challenger.tag if aliases.challenger else None, may_lack
        ),
    ]
    if intent.pin[0] != intent.pin[1]:
        in_registry.append(lambda: model_versions.set_pinned(root, params, pin))
    served = [lambda: _serve(root, aliases), lambda: _write_pin(root, pin)]
    # Forward, the service is moved last: it never serves what the registry does not know. Back, it is first:
    # a bad champion goes though the registry cannot be reached.
    back = intent.back or intent.record.action == "roll_back"
    yield from (*served, *in_registry) if back else (*in_registry, *served)
    yield lambda: append_release(root, intent.outcome)
    yield lambda: remove_intent(root)


def _point(root: Path, params: Params, alias: model_versions.Alias, tag: str | None, may_lack: bool) -> None:
    """Let an alias of the registry point at a version; at none, where the registry lacks it and may."""
    try:
        model_versions.set_alias(root, params, alias, tag)
    except InputError:
        if tag is None or not may_lack or _recorded(root, params, tag):
            raise
        logger.warning("the registry has no %s: its alias %s points at nothing", tag, alias)
        model_versions.set_alias(root, params, alias, None)


def _recorded(root: Path, params: Params, tag: str) -> bool:
    return any(info.tag == tag for info in model_versions.versions_table(root, params))


def _serve(root: Path, aliases: Aliases) -> None:
    path = root / ALIASES
    if read_aliases(path) != aliases:
        versions.take_over(aliases, path)


def _write_pin(root: Path, why: str | None) -> None:
    if why is None:
        (root / PIN).unlink(missing_ok=True)
    else:
        write_json(root / PIN, {"why": why})


def main(arguments: Sequence[str] | None = None) -> int:
    """Make a release by hand, or show how things stand; return the exit code."""
    options = _parser().parse_args(arguments)
    root = Path.cwd()

    def act() -> int:
        if options.command == "status":
            sys.stdout.write(status(root))
            return 0
        params = load_params(root / "params.yaml")
        done = release(root, params, options.action, options.tag, options.by, options.why)
        trial = f", {done.challenger} on trial" if done.challenger else ""
        sys.stdout.write(f"{done.action}: {done.champion or 'nobody'} is champion{trial}\n")
        return 0

    return run_command(act)


def status(root: Path) -> str:
    """Return who is served, what is pinned, and the last releases, as lines for a person."""
    aliases, pinned = read_aliases(root / ALIASES), pin_reason(root)
    trial = aliases.challenger
    lines = [
        f"champion    {aliases.champion or 'nobody'}",
        f"challenger  {f'{trial.tag} ({trial.mode}, {trial.share:.0%} of the users)' if trial else 'nobody'}",
        f"pinned      {pinned or 'no'}",
        f"managed     {'by releases' if aliases.managed else 'by hand, until the first release'}",
    ]
    if (intent := read_intent(root)) is not None:
        lines.append(
            f"broken off  {intent.record.action} of {intent.record.tag}: the next release settles it"
        )
    for record in reversed(read_releases(root)[-10:]):
        at = datetime.fromtimestamp(record.at, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        undone = " (undone)" if record.outcome == "undone" else ""
        lines.append(f"{at}  {record.action}{undone} {record.tag or ''} by {record.by}: {record.why}")
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="perennial release",
        description="Who is served: the aliases, moved by the gate's verdicts.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("status", help="who is served, and the last releases")
    words: dict[str, tuple[Action, str | None, str]] = {
        "try": ("try", "1", "some users get its answers"),
        "promote": ("promote", "1", "all users do"),
        "refuse": ("refuse", "1", "its trial ends"),
        "rollback": ("roll_back", "?", "the former champion again"),
        "pin": ("pin", None, "nothing takes the champion's place"),
        "unpin": ("unpin", None, "something may again"),
    }
    for word, (action, tags, meaning) in words.items():
        command = commands.add_parser(word, help=meaning)
        command.set_defaults(action=action, tag=None)
        if tags is not None:
            command.add_argument("tag", nargs=None if tags == "1" else "?", help="NAME:VERSION")
        command.add_argument("--why", required=True, help="for those who read it later")
        command.add_argument("--by", default=getpass.getuser(), help="who asks for it")
    return parser
