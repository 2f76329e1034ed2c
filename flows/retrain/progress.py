"""The state of the current retraining, the lock on it, and the results of earlier ones.

`.perennial/retrain.lock` is locked by the kernel as long as a process works on a retraining.
`.perennial/retrain.json` is its state after each step; it is removed at the end, so a state without a
lock belongs to a retraining that was killed, and the next one continues it.
`.perennial/retrainings.jsonl` has a result a line.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from flows.common.clock import Moment, compute_elapsed_s, read_moment
from stages.common.artifacts import STATE, read_json, write_json, write_text
from stages.common.errors import InputError
from stages.common.locks import try_file_lock

Step = Literal["gather", "train", "record", "gate", "canary"]
Outcome = Literal["promoted", "rejected", "unchanged", "abandoned"]
RECORD = STATE / "retrain.json"
HISTORY = STATE / "retrainings.jsonl"
STEPS: tuple[Step, ...] = ("gather", "train", "record", "gate", "canary")

logger = logging.getLogger("flows.retrain.progress")


@dataclass(frozen=True, slots=True)
class RetrainState:
    """A retraining that has not ended.

    Attributes:
        id: its start, as YYYYMMDDThhmmss in UTC.
        reason: free text; verdict: the drift verdict that triggered it, if one did.
        champion: tag of the version to replace; None for the first version ever.
        since: unix s; traffic from then on is the new traffic.
        until: unix s; feedback given later belongs to the next retraining.
        step: the next step.
        candidate: tag of the new version, once it is recorded.
        canary_since: unix s, once users get it.
    """

    id: str
    reason: str
    verdict: str | None
    champion: str | None
    since: float
    until: float
    step: Step = "gather"
    candidate: str | None = None
    canary_since: float | None = None


@dataclass(frozen=True, slots=True)
class RetrainResult:
    """How a retraining ended, `at` in unix s; `ended` is the same by a clock that cannot be set."""

    id: str
    at: float
    outcome: Outcome
    summary: str
    champion: str | None
    candidate: str | None
    ended: Moment | None = None


@contextmanager
def lock(root: Path) -> Iterator[bool]:
    """Hold the lock on retraining for the block; yield False if another process holds it."""
    with try_file_lock(root / STATE / "retrain.lock") as held:
        yield held


def is_running(root: Path) -> bool:
    """Return whether a process works on a retraining now."""
    with lock(root) as free:
        return not free


def start(
    root: Path, reason: str, verdict: str | None, champion: str | None, since: float, now: float | None = None
) -> RetrainState:
    """Save the state of a new retraining; call with the lock held."""
    now = time.time() if now is None else now
    name = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now))
    return save_state(root, RetrainState(name, reason, verdict, champion, since, now))


def save_state(root: Path, state: RetrainState) -> RetrainState:
    """Write the state of the retraining; return it."""
    write_json(root / RECORD, asdict(state))
    return state


def advance(root: Path, state: RetrainState, **changes: object) -> RetrainState:
    """Save that the current step is done, with its results; after the last step the step stays."""
    position = STEPS.index(state.step) + 1
    step = STEPS[min(position, len(STEPS) - 1)]
    return save_state(root, replace(state, step=step, **changes))  # type: ignore[arg-type]


def read_state(root: Path) -> RetrainState | None:
    """Return the state of the retraining that runs or was killed; None if there is none.

    Raises:
        InputError: the file cannot be read.
    """
    path = root / RECORD
    if not path.exists():
        return None
    try:
        return RetrainState(**read_json(path))
    except TypeError as error:
        raise InputError(f"{path} is not a valid state of a retraining ({error})", "remove it") from None


def finish(root: Path, state: RetrainState, outcome: Outcome, summary: str) -> RetrainResult:
    """Append the result of a retraining to the history and remove its state."""
    ended = read_moment()
    result = RetrainResult(state.id, ended.at, outcome, summary, state.champion, state.candidate, ended)
    before = read_history(root)
    if not any(one.id == result.id for one in before):  # killed between the two files
        _write_history(root, [*before, result])
    (root / RECORD).unlink(missing_ok=True)
    return result


def read_history(root: Path) -> list[RetrainResult]:
    """Return the results of all retrainings, the oldest first.

    Raises:
        InputError: a line cannot be read.
    """
    path = root / HISTORY
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    try:
        return [_read_result(line) for line in lines]
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{path} is not a valid history of retrainings ({error})", "remove the broken line"
        ) from None


def _read_result(line: str) -> RetrainResult:
    values = json.loads(line)
    ended = values.get("ended")
    return RetrainResult(**{**values, "ended": Moment(**ended) if ended else None})


def _write_history(root: Path, results: Sequence[RetrainResult]) -> None:
    write_text(root / HISTORY, "".join(json.dumps(asdict(one), sort_keys=True) + "\n" for one in results))


def measure_pause(root: Path, now: Moment) -> float | None:
    """Return the seconds since the last retraining ended; None if there was none.

    An end in the future is moved to now, once: the clock was wrong then, and no pause should last until it
    is right again.

    Raises:
        InputError: the history cannot be read.
    """
    results = read_history(root)
    if not results:
        return None
    last = results[-1]
    ended = last.ended or Moment(last.at, "", 0.0)
    if ended.at > now.at and (not ended.boot or ended.boot != now.boot):
        logger.warning("the last retraining ended in the future: the clock was wrong; it counts from now on")
        ended = now
        _write_history(root, [*results[:-1], replace(last, at=now.at, ended=now)])
    return compute_elapsed_s(ended, now)
