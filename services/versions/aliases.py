"""The alias file, `.perennial/aliases.json`: which version is champion, which is challenger, and since when.

It is the only place that holds this; MLflow's aliases mirror it. It is replaced as a whole by one rename, so
that a kill leaves the old state or the new one. A running service follows it. `flows.release` alone writes
the file of a checkout; the gate's private service and a Bento have files of their own.

Without a file no release has been made yet, and the service serves the pipeline's newest model
(`services.versions.store.find_served`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from services.versions.releases import Release
from stages.common.artifacts import STATE, read_json, write_json
from stages.common.errors import InputError

ALIASES = STATE / "aliases.json"
HISTORY = 20  # former champions that a rollback can reach
Mode = Literal["canary", "shadow"]


@dataclass(frozen=True, slots=True)
class Challenger:
    """A version that `share` of the users get answers from (canary), or that is asked the same (shadow).

    Attributes:
        since: unix time of its start, s.
    """

    tag: str
    share: float
    mode: Mode
    since: float | None = None


@dataclass(frozen=True, slots=True)
class Aliases:
    """The content of the alias file.

    Attributes:
        champion: tag of the version that is served; None before the first release.
        champion_since: unix time from which it has been served, s.
        replaced: tag of the champion it was promoted over; None for the first one, and after a rollback.
        history: tags of former champions that a rollback can reach, newest last.
        pinned: why nothing may replace the champion; None if something may.
        release: the release that wrote this state.
    """

    champion: str | None = None
    challenger: Challenger | None = None
    history: tuple[str, ...] = ()
    champion_since: float | None = None
    replaced: str | None = None
    pinned: str | None = None
    release: Release | None = None


def read_aliases(path: Path = ALIASES) -> Aliases:
    """Read an alias file; `Aliases()` if there is none.

    Args:
        path: `root / ALIASES` for another checkout than the current folder.

    Raises:
        InputError: the file is broken.
    """
    if not path.exists():
        return Aliases()
    values = read_json(path)
    try:
        challenger, release = values["challenger"], values["release"]
        return Aliases(
            **{
                **values,
                "challenger": Challenger(**challenger) if challenger else None,
                "history": tuple(values["history"]),
                "release": Release(**release) if release else None,
            }
        )
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not a valid alias file ({error})",
            "remove it and promote a version: perennial release promote TAG --first --reason TEXT",
        ) from None


def write_aliases(path: Path, aliases: Aliases) -> None:
    """Replace an alias file as a whole; for the file of a checkout only `flows.release` calls this."""
    write_json(path, asdict(aliases))
