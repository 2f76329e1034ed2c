"""The journal of releases: what was done, kept for good, and what is about to be, until it is done.

`.perennial/releases.jsonl` holds a line for every release. `.perennial/release-intent.json` is there only
while one is under way, or was killed. `flows.release` writes both while it holds its lock; anybody may read.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from services.versions.__main__ import Aliases, Challenger
from stages.common.artifacts import STATE, read_json, write_json
from stages.common.errors import InputError

INTENT = STATE / "release-intent.json"
RELEASES = STATE / "releases.jsonl"


@dataclass(frozen=True, slots=True)
class ReleaseRecord:
    """One line of `.perennial/releases.jsonl`.

    Attributes:
        at: unix time, s.
        action: of `flows.release.ACTIONS`, or "adopt": releases found this champion and took it over.
        champion, challenger: tags afterwards; former: the champion before.
        outcome: "undone": it was killed, and taken back by the next.
    """

    id: str
    at: float
    action: str
    tag: str | None
    by: str
    why: str
    champion: str | None
    challenger: str | None
    former: str | None
    outcome: Literal["done", "undone"] = "done"


@dataclass(frozen=True, slots=True)
class Intent:
    """What a release is about to do, written before it does it.

    Attributes:
        pin: why the champion is pinned, before and after.
        back: it is to be taken back, because it failed half-way.
    """

    record: ReleaseRecord
    before: Aliases
    after: Aliases
    pin: tuple[str | None, str | None]
    back: bool = False

    @property
    def outcome(self) -> ReleaseRecord:
        """The line of the journal that it ends with."""
        if not self.back:
            return self.record
        trial = self.before.challenger
        return replace(
            self.record,
            outcome="undone",
            champion=self.before.champion,
            challenger=trial.tag if trial else None,
        )


def read_releases(root: Path) -> list[ReleaseRecord]:
    """Return every release, the oldest first; a last line that was cut off by a kill does not count."""
    path = root / RELEASES
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    found = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            found.append(ReleaseRecord(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{path}, line {number} is no release: {error}", "mend the line, or move the file away"
            ) from None
    return found


def done_releases(root: Path) -> list[ReleaseRecord]:
    """Return the releases that were not taken back, the oldest first."""
    found = read_releases(root)
    undone = {record.id for record in found if record.outcome == "undone"}
    return [record for record in found if record.id not in undone]


def trial_record(root: Path, tag: str) -> ReleaseRecord | None:
    """Return the release that began a version's last trial, or None."""
    found = [record for record in done_releases(root) if record.action == "try" and record.tag == tag]
    return found[-1] if found else None


def append_release(root: Path, record: ReleaseRecord) -> None:
    """Add a line, once; what a kill left of a line before it is cut off."""
    if any((known.id, known.outcome) == (record.id, record.outcome) for known in read_releases(root)):
        return
    line = json.dumps(asdict(record), ensure_ascii=False, allow_nan=False) + "\n"
    with open(root / RELEASES, "a+b") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write(line.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())


def write_intent(root: Path, intent: Intent) -> None:
    """Write what is about to be done."""
    write_json(root / INTENT, asdict(intent))


def read_intent(root: Path) -> Intent | None:
    """Return what a release is about to do, or a killed one was; None if there is none.

    Raises:
        InputError: the file holds something else.
    """
    path = root / INTENT
    if not path.exists():
        return None
    values = read_json(path)
    try:
        return Intent(
            record=ReleaseRecord(**values["record"]),
            before=_aliases(values["before"]),
            after=_aliases(values["after"]),
            pin=(values["pin"][0], values["pin"][1]),
            back=values["back"],
        )
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"{path} is no intent of a release: {error}",
            "compare python -m flows.release status with the registry, then remove the file",
        ) from None


def remove_intent(root: Path) -> None:
    """Note that all of it is done."""
    (root / INTENT).unlink(missing_ok=True)


def _aliases(values: dict[str, Any]) -> Aliases:
    trial = values["challenger"]
    return Aliases(
        values["champion"],
        Challenger(**trial) if trial else None,
        tuple(values["history"]),
        values["managed"],
    )
