"""The state of the programs of `make up`: written by the supervisor, read by the dashboard."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil

from stages.common.artifacts import STATE, read_json, write_json
from stages.common.errors import InputError

UP_STATE = STATE / "up.json"
Condition = Literal["waiting", "starting", "up", "down"]


@dataclass(frozen=True, slots=True)
class ProgramState:
    """The state of one program.

    Attributes:
        since: unix time of the last change, s.
        reason: why it is not up; "" if it is.
        page: its address for people; None if it has none.
    """

    state: Condition
    since: float
    restarts: int
    reason: str
    page: str | None
    log: str
    pid: int | None


@dataclass(frozen=True, slots=True)
class UpState:
    """The supervisor's process, its start (unix s), and the state of its programs by name."""

    pid: int
    started_at: float
    programs: dict[str, ProgramState]


def write_up_state(path: Path, state: UpState) -> None:
    """Write the state, all or nothing."""
    write_json(path, asdict(state))


def read_up_state(root: Path) -> UpState | None:
    """Return the state that a running supervisor wrote; None if none runs in this checkout.

    Raises:
        InputError: the file is broken.
    """
    path = root / UP_STATE
    if not path.exists():
        return None
    values = read_json(path)
    try:
        programs = {name: ProgramState(**program) for name, program in values["programs"].items()}
        state = UpState(values["pid"], values["started_at"], programs)
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a valid state of `make up`: {error!r}", "remove it") from None
    return state if psutil.pid_exists(state.pid) else None
