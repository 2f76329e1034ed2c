"""The dashboard's charts, as SVG without scripts: traffic and quality over time.

Places along the time axis are percentages and heights are pixels, so a drawing takes any width and its
letters keep their size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from html import escape
from itertools import pairwise
from typing import Any

HEIGHT = 150  # of a plot, px
MARKS = 26  # of the row of verdicts, px
LEAST_THUMBS = 3  # fewer in a bin are too few to show
Bin = dict[str, Any]
GRID = "".join(
    f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/>' for y in (0.5, HEIGHT / 2, HEIGHT - 0.5)
)


def draw_charts(
    traffic: dict[str, Any], verdicts: Sequence[dict[str, Any]], releases: Sequence[dict[str, Any]]
) -> dict[str, str]:
    """Return the charts by name: "marks" (one per verdict), "requests" and "quality", over one time axis.

    Args:
        traffic: as `read_status` gives it, with at least one bin.
        verdicts, releases: likewise; those outside the time axis are excluded.
    """
    rows: list[Bin] = traffic["bins"]
    start, end = float(rows[0]["start"]), float(rows[-1]["end"])

    def place(at: float) -> float:
        return 100.0 * (at - start) / (end - start)

    changes = list(_champion_changes(releases, start, end))
    lines = "".join(
        f'<line class="change" x1="{place(at):.2f}%" x2="{place(at):.2f}%" y1="0" y2="{HEIGHT}"/>'
        for at, _ in changes
    )
    seen = [one for one in verdicts if start <= one["end"] <= end + traffic["step_s"]]
    return {
        "marks": _marks(seen, changes, place) if seen or changes else "",
        "requests": _requests(rows, place, lines) + _axis(start, end),
        "quality": _quality(rows, place, lines) + _axis(start, end),
    }


def _champion_changes(
    releases: Sequence[dict[str, Any]], start: float, end: float
) -> Iterator[tuple[float, str]]:
    for release in releases:
        if release["champion"] != release["former"] and start <= release["at"] <= end:
            yield release["at"], release["champion"]


def _marks(
    verdicts: Sequence[dict[str, Any]],
    changes: Sequence[tuple[float, str]],
    place: Callable[[float], float],
) -> str:
    """One mark a window at its end: a filled diamond for drift, a ring for none, a dash where not judged."""
    middle = MARKS / 2
    parts = []
    for one in verdicts:
        x = min(place(one["end"]), 99.2)
        title = f"<title>{escape(one['id'])}: {escape(one['summary'])}</title>"
        if not one["judged"]:
            parts.append(f'<text class="unjudged" x="{x:.2f}%" y="{middle + 4}">–{title}</text>')
        elif one["drifted"]:
            # The shape tells it from a ring, not the colour alone.
            parts.append(f'<text class="drift" x="{x:.2f}%" y="{middle + 6}">◆{title}</text>')
        else:
            parts.append(f'<circle class="calm" cx="{x:.2f}%" cy="{middle}" r="4">{title}</circle>')
    for at, tag in changes:
        x = place(at)
        parts.append(
            f'<line class="change" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="{MARKS}">'
            f"<title>{escape(tag)} became champion</title></line>"
        )
    drifted = sum(1 for one in verdicts if one["drifted"])
    label = f"{len(verdicts)} windows judged, {drifted} with drift, {len(changes)} changes of champion"
    return _svg("marks", MARKS, label, "".join(parts))


def _requests(rows: Sequence[Bin], place: Callable[[float], float], lines: str) -> str:
    most = max(1, *(row["requests"] for row in rows))
    top = _round_up(most)
    parts = [GRID]
    for row in rows:
        x, width = place(row["start"]), max(0.2, 0.86 * (place(row["end"]) - place(row["start"])))
        height = (HEIGHT - 1) * row["requests"] / top
        title = (
            f"<title>{_time(row['start'])}: {row['requests']:,} requests, {row['failed']:,} failed</title>"
        )
        parts.append(
            f'<rect class="bar" x="{x:.2f}%" width="{width:.2f}%" y="{HEIGHT - height:.1f}"'
            f' height="{height:.1f}">{title}</rect>'
        )
        if row["failed"]:
            bad = max(2.0, (HEIGHT - 1) * row["failed"] / top)
            parts.append(
                f'<rect class="bad" x="{x:.2f}%" width="{width:.2f}%" y="{HEIGHT - bad:.1f}"'
                f' height="{bad:.1f}">{title}</rect>'
            )
    total = sum(row["requests"] for row in rows)
    failed = sum(row["failed"] for row in rows)
    label = f"Requests over time: {total:,} in all, at most {most:,} in one bar, {failed:,} failed"
    levels = _levels(f"{top:,}", f"{top // 2:,}")
    return levels + _svg("plot", HEIGHT, label, "".join(parts) + lines)


def _quality(rows: Sequence[Bin], place: Callable[[float], float], lines: str) -> str:
    def valid(row: Bin) -> float | None:
        return row["valid"] / row["checked"] if row["checked"] else None

    def liked(row: Bin) -> float | None:
        thumbs = row["thumbs_up"] + row["thumbs_down"]
        return row["thumbs_up"] / thumbs if thumbs >= LEAST_THUMBS else None

    parts = [GRID]
    summary = []
    for name, word, share in (("valid", "valid answers", valid), ("liked", "thumbs up", liked)):
        points = [
            (place((row["start"] + row["end"]) / 2), value, row)
            for row in rows
            if (value := share(row)) is not None
        ]
        parts += _line(name, word, points)
        if points:
            summary.append(f"{word} {points[0][1]:.0%} at first, {points[-1][1]:.0%} at last")
    label = "Quality over time: " + ("; ".join(summary) or "nothing known yet")
    return _levels("100 %", "50 %") + _svg("plot", HEIGHT, label, "".join(parts) + lines)


def _line(name: str, word: str, points: Sequence[tuple[float, float, Bin]]) -> Iterator[str]:
    def height(value: float) -> float:
        return 1 + (HEIGHT - 2) * (1 - value)

    for (x1, y1, one), (x2, y2, other) in pairwise(points):
        if other["start"] > one["end"] + 2 * (one["end"] - one["start"]):
            continue  # nothing is known of a long gap
        yield (
            f'<line class="{name}" x1="{x1:.2f}%" x2="{x2:.2f}%"'
            f' y1="{height(y1):.1f}" y2="{height(y2):.1f}"/>'
        )
    for x, y, row in points:
        title = f"<title>{_time(row['start'])}: {word} {y:.1%}</title>"
        if name == "valid":
            yield f'<circle class="{name}" cx="{x:.2f}%" cy="{height(y):.1f}" r="3">{title}</circle>'
        else:
            yield f'<text class="{name}" x="{x:.2f}%" y="{height(y) + 3.5:.1f}">■{title}</text>'


def _levels(top: str, middle: str) -> str:
    """Return the labels of the grid lines, as a column."""
    places = ((9, top), (HEIGHT // 2 + 4, middle), (HEIGHT, "0"))
    texts = "".join(f'<text x="100%" y="{y}">{word}</text>' for y, word in places)
    return f'<svg class="levels" width="100%" height="{HEIGHT}" aria-hidden="true">{texts}</svg>'


def _axis(start: float, end: float) -> str:
    days = end - start > 86_400
    texts = "".join(
        f'<text class="{anchor}" x="{share:.0%}" y="13">{_time(start + share * (end - start), days)}</text>'
        for share, anchor in ((0.0, "from"), (0.5, "mid"), (1.0, "to"))
    )
    return f'<svg class="axis" width="100%" height="18" aria-hidden="true">{texts}</svg>'


def _time(at: float, days: bool = True) -> str:
    return datetime.fromtimestamp(at).strftime("%d %b %H:%M" if days else "%H:%M")


def _round_up(count: int) -> int:
    """Return the next of 2, 4, 10, 20, 40, 100 …: halves of them are whole."""
    scale = 1
    while True:
        for step in (2, 4, 10):
            if count <= step * scale:
                return step * scale
        scale *= 10


def _svg(name: str, height: int, label: str, inside: str) -> str:
    return (
        f'<svg class="{name}" width="100%" height="{height}" role="img" aria-label="{escape(label)}">'
        f"{inside}</svg>"
    )
