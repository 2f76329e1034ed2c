"""The one retraining that is under way: what it is for, how far it came, and who works on it.

`.perennial/retrain.lock` is locked by the kernel for as long as a process works on it.
`.perennial/retrain.json` says what is done already; it is removed at the end, so that a record without a
lock is the mark of a retraining that was killed, and the next one goes on with it.
`.perennial/retrainings.jsonl` keeps how each ended.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from stages.common.artifacts import STATE, read_json, write_json, write_text
from stages.common.errors import InputError
from stages.common.locks import try_file_lock

Step = Literal["gather", "train", "record", "gate", "canary"]
Outcome = Literal["promoted", "rejected", "unchanged", "abandoned"]
RECORD = STATE / "retrain.json"
HISTORY = STATE / "retrainings.jsonl"
STEPS: tuple[Step, ...] = ("gather", "train", "record", "gate", "canary")


@dataclass(frozen=True, slots=True)
class Retraining:
    """A retraining that has not ended.

    Attributes:
        id: when it began, as YYYYMMDDThhmmss in UTC.
        why: in words; verdict: the drift verdict that triggered it, if one did.
        champion: tag of the version that is to be replaced; None for the first version of all.
        since: unix s; traffic from then on is the new traffic.
        until: unix s; feedback given later belongs to the next retraining.
        step: what is to be done next.
        candidate: tag of the new version, once it is recorded.
        on_trial_since: unix s, once users see it.
    """

    id: str
    why: str
    verdict: str | None
    champion: str | None
    since: float
    until: float
    step: Step = "gather"
    candidate: str | None = None
    on_trial_since: float | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """How a retraining ended, `at` in unix s."""

    id: str
    at: float
    outcome: Outcome
    said: str
    champion: str | None
    candidate: str | None


@contextmanager
def lock(root: Path) -> Iterator[bool]:
    """Hold the lock on retraining for the block; yield False if another process holds it."""
    with try_file_lock(root / STATE / "retrain.lock") as held:
        yield held


def is_running(root: Path) -> bool:
    """Tell whether some process works on a retraining now."""
    with lock(root) as free:
        return not free


def begin(
    root: Path, why: str, verdict: str | None, champion: str | None, since: float, now: float | None = None
) -> Retraining:
    """Set down a new retraining; call while `working`."""
    now = time.time() if now is None else now
    name = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now))
    return save(root, Retraining(name, why, verdict, champion, since, now))


def save(root: Path, retraining: Retraining) -> Retraining:
    """Set down how far it came."""
    write_json(root / RECORD, asdict(retraining))
    return retraining


def advance(root: Path, retraining: Retraining, **changes: object) -> Retraining:
    """Set down that the present step is done, and what came of it; the last step stays."""
    position = STEPS.index(retraining.step) + 1
    return save(
        root,
        replace(retraining, step=STEPS[min(position, len(STEPS) - 1)], **changes),  # type: ignore[arg-type]
    )


def unfinished(root: Path) -> Retraining | None:
    """Return the retraining that is under way or was killed; None if there is none.

    Raises:
        InputError: the record cannot be read.
    """
    path = root / RECORD
    if not path.exists():
        return None
    try:
        return Retraining(**read_json(path))
    except TypeError as error:
        raise InputError(f"{path} is no record of a retraining ({error})", "remove it") from None


def finish(root: Path, retraining: Retraining, outcome: Outcome, said: str) -> Ended:
    """Set down how a retraining ended; it is under way no more."""
    ended = Ended(retraining.id, time.time(), outcome, said, retraining.champion, retraining.candidate)
    before = history(root)
    if not any(one.id == ended.id for one in before):  # killed between the two files
        lines = [json.dumps(asdict(one), sort_keys=True) + "\n" for one in (*before, ended)]
        write_text(root / HISTORY, "".join(lines))
    (root / RECORD).unlink(missing_ok=True)
    return ended


def history(root: Path) -> list[Ended]:
    """Return how the retrainings ended, the oldest first.

    Raises:
        InputError: a line of the record cannot be read.
    """
    path = root / HISTORY
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    try:
        return [Ended(**json.loads(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is no record of retrainings ({error})", "remove the broken line") from None
