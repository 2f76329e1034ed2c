"""The journal of releases, `.perennial/releases.jsonl`: one line for each, never changed.

It is the history for people. What is true now is in the alias file (`services.versions.aliases`), which
holds the last release as well; a line that a kill kept from the journal is added from there by the next
release. Only `flows.release` writes here.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from stages.common.artifacts import STATE, make_folder
from stages.common.errors import InputError

RELEASES = STATE / "releases.jsonl"

Action = Literal["promote", "canary", "reject", "rollback", "pin", "unpin"]


@dataclass(frozen=True, slots=True)
class Release:
    """One release, as the journal and the alias file keep it.

    Attributes:
        at: unix time, s.
        tag: the version that was named; the champion, for a rollback, pin or unpin.
        by: a person's name, or the flow that decided.
        champion, challenger: tags after the release; former: the champion before it.
    """

    id: str
    at: float
    action: Action
    tag: str
    by: str
    reason: str
    champion: str | None
    challenger: str | None
    former: str | None


def read_releases(root: Path) -> list[Release]:
    """Read every release of a checkout, oldest first; a last line cut off by a kill is ignored.

    Raises:
        InputError: a line is not a release.
    """
    path = root / RELEASES
    if not path.exists():
        return []
    complete, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    found = []
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            found.append(Release(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{path}, line {number} is not a valid release: {error}",
                "fix the line, or move the file away",
            ) from None
    return found


def append_release(root: Path, release: Release) -> None:
    """Add a release to the journal unless it is there; a line cut off by a kill is removed first."""
    if any(known.id == release.id for known in read_releases(root)):
        return
    line = json.dumps(asdict(release), ensure_ascii=False, allow_nan=False) + "\n"
    path = root / RELEASES
    make_folder(path.parent)
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())
