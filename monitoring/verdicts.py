"""The drift verdict on a window of traffic, for programs and people.

In: the results of the drift test. Out: `reports/watch/<window>/verdict.json`.

Run: `perennial verdicts list` or `perennial verdicts show 20261121T101500-500`
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from monitoring.traffic.columns import DECIDING, DriftType, Kind
from stages.common.artifacts import read_json, write_json
from stages.common.errors import InputError
from stages.common.escaping import clean_line

logger = logging.getLogger("monitoring.verdicts")

WATCH = Path("reports") / "watch"


@dataclass(frozen=True, slots=True)
class Period:
    """A stretch of traffic: [start, end) in unix s, and how much of it was looked at."""

    start: float
    end: float
    rows: int
    sessions: int


@dataclass(frozen=True, slots=True)
class ColumnChange:
    """How one column of the window differs from the reference.

    Attributes:
        effect: between 0, no change, and 1, nothing in common; see `monitoring.drift`.
        p_value: how often chance alone makes a change as strong in any column of the same drift type.
        inflation: by how much calibration divided the statistic; 1 for a reference like pure chance, and in
            a window that is plainly quiet even without.
        drifted: sure enough and large enough, and in the direction that counts.
        before, after: the reference and the window in a few words, such as "12 %" or "median 31 characters".
        summary: one sentence for people.
        judged: whether both sides had enough values in enough sessions.
    """

    column: str
    kind: Kind
    effect: float
    p_value: float
    inflation: float
    drifted: bool
    before: str
    after: str
    summary: str
    judged: bool = True


@dataclass(frozen=True, slots=True)
class DriftTypeVerdict:
    """The verdict on one drift type.

    Attributes:
        p_value: of its strongest column; columns: strongest first.
        smallest_change: the power of the test: the smallest change of a share that would have been found
            more likely than not, see `monitoring.drift.power`; None if no column could be judged.
    """

    drift_type: DriftType
    drifted: bool
    p_value: float
    columns: tuple[ColumnChange, ...]
    smallest_change: float | None = None


@dataclass(frozen=True, slots=True)
class TriggerDecision:
    """Whether a retraining starts, why, and exactly what is missing if not."""

    fires: bool
    why: str
    needs: tuple[str, ...]

    @property
    def summary(self) -> str:
        """Return the decision in one line."""
        if self.fires:
            return f"{self.why}: a retraining is called for"
        return self.why + (f"; a retraining needs {', '.join(self.needs)}" if self.needs else "")


NOT_DECIDED = TriggerDecision(fires=False, why="not decided", needs=())


@dataclass(frozen=True, slots=True)
class DriftVerdict:
    """The result of one window's drift test.

    Attributes:
        id: the name of the window, and of its folder.
        model, version: the champion that answered; its tag is `model:version`.
        made_at: unix time, s.
        reference: None while there is too little usual traffic to compare with.
        why_not: the reason if the window was not judged.
        drifted: one of the three deciding questions did; the service never decides.
        quarantined: corrupt events by reason, excluded from all figures.
        late_rows: exchanges of this window that reached the store after it was judged.
        alpha: chance that this check raises an alarm on unchanged traffic.
        service: figures of the window such as "total_p95_s"; None where nothing was measured.
        problems: what failed after the window was judged: the decision on a retraining, a page.
    """

    id: str
    model: str
    version: str
    made_at: float
    window: Period
    reference: Period | None
    judged: bool
    why_not: str | None
    drifted: bool
    drift_types: tuple[DriftTypeVerdict, ...] = ()
    quarantined: dict[str, int] = field(default_factory=dict)
    late_rows: int = 0
    alpha: float = 0.0
    service: dict[str, float | None] = field(default_factory=dict)
    trigger: TriggerDecision = NOT_DECIDED
    problems: tuple[str, ...] = ()

    @property
    def tag(self) -> str:
        """Return `model:version`, the identity that all evidence refers to."""
        return f"{self.model}:{self.version}"

    @property
    def changes(self) -> tuple[ColumnChange, ...]:
        """Return the columns that drifted, strongest first within each drift type."""
        return tuple(change for one in self.drift_types for change in one.columns if change.drifted)

    @property
    def power(self) -> str:
        """Return what the check would have found, in words; empty where nothing was compared."""
        parts = [
            f"{one.drift_type}: not judged"
            if one.smallest_change is None
            else f"{one.drift_type} from {100 * one.smallest_change:.0f} %"
            for one in self.drift_types
            if one.drift_type in DECIDING
        ]
        return f"changes that would be found: {', '.join(parts)}" if parts else ""

    @property
    def summary(self) -> str:
        """Return the verdict in one line."""
        if not self.judged:
            return f"not judged: {self.why_not}"
        if not self.drifted:
            return f"no drift{self.power and f' ({self.power})'}"
        decided = [one for one in self.drift_types if one.drifted and one.drift_type in DECIDING]
        changes = [change for one in decided for change in one.columns if change.drifted]
        strongest = [next(change for change in one.columns if change.drifted) for one in decided]
        more = len(changes) - len(strongest)
        return (
            f"drift of {', '.join(one.drift_type for one in decided)}: "
            + "; ".join(change.summary for change in strongest)
            + (f"; and {more} more" if more else "")
        )


_ADAPTER: TypeAdapter[DriftVerdict] = TypeAdapter(DriftVerdict)


def get_window_folder(root: Path, window_id: str) -> Path:
    """Return the folder of a window."""
    return root / WATCH / window_id


def list_verdict_files(root: Path) -> list[Path]:
    """Return the files of all verdicts by window; the name of a window's folder starts with its time."""
    return sorted((root / WATCH).glob("*/verdict.json"))


def write_verdict(root: Path, verdict: DriftVerdict) -> Path:
    """Write the verdict, all or nothing, over an older one of the same window; return its path.

    Raises:
        ValueError: a figure is NaN or infinite.
    """
    path = get_window_folder(root, verdict.id) / "verdict.json"
    write_json(path, asdict(verdict))
    return path


def move_broken_verdicts(root: Path) -> list[Path]:
    """Rename the files that are no verdicts to `verdict.broken.json`, and return their new paths.

    The window of the newest one is judged again; an older one is not judged again.
    """
    moved = []
    for path in list_verdict_files(root):
        try:
            _read(path)
        except InputError as error:
            aside = path.replace(path.with_name("verdict.broken.json"))
            logger.warning("%s; moved to %s", error.what, aside)
            moved.append(aside)
    return moved


def read_verdict(root: Path, window_id: str) -> DriftVerdict:
    """Read the verdict on one window.

    Raises:
        InputError: there is none, or the file is not one.
    """
    path = get_window_folder(root, window_id) / "verdict.json"
    # A name comes from the command line too, and must not lead out of the folder.
    if "/" in window_id or not path.exists():
        raise InputError(f"there is no verdict {window_id!r} in {root / WATCH}", "perennial verdicts list")
    return _read(path)


def read_verdicts(root: Path) -> list[DriftVerdict]:
    """Read all verdicts, oldest window first; an empty list where nothing was watched yet.

    Raises:
        InputError: a file is not a verdict; the message names it.
    """
    verdicts = [_read(path) for path in list_verdict_files(root)]
    return sorted(verdicts, key=lambda verdict: (verdict.window.end, verdict.id))


def _read(path: Path) -> DriftVerdict:
    fix = f"remove {path.parent}: the next watch judges its window again"
    try:
        return _ADAPTER.validate_python(read_json(path))
    except InputError as error:
        raise InputError(error.what, fix) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path} is not a valid verdict: {where}: {first['msg']}", fix) from None


def format_list(verdicts: Sequence[DriftVerdict]) -> list[str]:
    """Return a plain table with one line a window, oldest first."""
    if not verdicts:
        return ["no window was judged yet: perennial watch"]
    lines = [("window", "version", "rows", "until (UTC)", "verdict")]
    lines += [
        (
            verdict.id,
            verdict.version,
            f"{verdict.window.rows:,}",
            _time(verdict.window.end),
            verdict.summary + (" -> retrain" if verdict.trigger.fires else ""),
        )
        for verdict in verdicts
    ]
    return _aligned(lines)


def format_verdict(verdict: DriftVerdict) -> list[str]:
    """Return one window's verdict in full, as plain lines."""
    window, reference = verdict.window, verdict.reference
    lines = [
        f"window     {verdict.id} of {verdict.tag}",
        f"           {_time(window.start)} to {_time(window.end)} UTC,"
        f" {window.rows:,} rows in {window.sessions:,} sessions",
        "reference  none"
        if reference is None
        else f"reference  {_time(reference.start)} to {_time(reference.end)} UTC,"
        f" {reference.rows:,} rows in {reference.sessions:,} sessions",
        f"verdict    {verdict.summary}",
        f"retraining {'starts: ' if verdict.trigger.fires else ''}{verdict.trigger.why}",
        *(f"           needs {need}" for need in verdict.trigger.needs),
    ]
    for one in verdict.drift_types:
        lines += [
            "",
            f"{one.drift_type}: {'drifted' if one.drifted else 'no drift'}"
            f" (p {_p(one.p_value)}, a check of unchanged traffic alarms with chance {verdict.alpha:g}"
            + (
                ""
                if one.smallest_change is None
                else f", finds changes from {100 * one.smallest_change:.0f} %"
            )
            + ")",
            *_aligned(
                [
                    ("", "column", "effect", "p", "inflation", "reference", "window"),
                    *(
                        (
                            "*" if change.drifted else "",
                            change.column,
                            f"{change.effect:.3f}",
                            _p(change.p_value) if change.judged else "too few",
                            f"{change.inflation:.2f}",
                            change.before,
                            change.after,
                        )
                        for change in one.columns
                    ),
                ]
            ),
        ]
    if verdict.service:
        lines += ["", "service (reported, never decides)"]
        lines += _aligned(
            [(name, "-" if value is None else f"{value:,.4g}") for name, value in verdict.service.items()]
        )
    lines += [""] if verdict.quarantined or verdict.late_rows else []
    lines += [f"quarantined {count:,}: {reason}" for reason, count in sorted(verdict.quarantined.items())]
    if verdict.late_rows:
        lines.append(f"late       {verdict.late_rows:,} rows came after the verdict and are in no window")
    lines += [f"problem    {problem}" for problem in verdict.problems]
    return lines


def _time(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.0001 else "<0.0001"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def main(words: Sequence[str] | None = None) -> int:
    """Show the verdicts; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="perennial verdicts", description="Show the drift verdicts of the windows of traffic."
    )
    commands = parser.add_subparsers(dest="command", metavar="list | show")
    commands.add_parser("list", help="one line per window, oldest first (default)")
    commands.add_parser("show", help="everything about one window").add_argument(
        "id", help="id of the window, as `list` shows it"
    )
    options = parser.parse_args(words)
    try:
        lines = (
            format_verdict(read_verdict(Path(), options.id))
            if options.command == "show"
            else format_list(read_verdicts(Path()))
        )
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write("".join(f"{clean_line(line)}\n" for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
