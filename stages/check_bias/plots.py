"""The plot of the groups: the share of each value with its interval."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.check_bias.findings import Finding, Share
from stages.common.escaping import escape_mathtext
from stages.common.svg import draw_figure

MAX_DRAWN_VALUES = 12  # of one group in the plot_groups


def plot_groups(
    shares: Mapping[str, Sequence[Share]], findings: Sequence[Finding], label: str, path: Path
) -> None:
    """Plot the share of each value of each group, with its interval.

    The colours are Okabe & Ito's, which differ for any kind of colour vision; a group that failed is also
    marked in its title.
    """
    drawn = {group: list(values)[:MAX_DRAWN_VALUES] for group, values in shares.items() if len(values) > 1}
    notes = [
        f"{group}: not present" if not values else f"{group}: only {values[0].value}"
        for group, values in shares.items()
        if len(values) < 2
    ]
    heights = [0.9 + 0.28 * len(values) for values in drawn.values()] or [0.5]
    with draw_figure(path, 7.5, sum(heights) + 0.9, font_size=9) as figure:
        figure.suptitle(
            "Share of the rows that have a value, with 95 % intervals (dotted: equal shares)", fontsize=10
        )
        axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axis, (group, values) in zip(axes, drawn.items(), strict=False):
            own = [finding for finding in findings if finding.group == group]
            _plot_group(axis, group, values, len(shares[group]), own, label)
        if not drawn:
            axes[0].set_axis_off()
        if notes:
            figure.supxlabel(escape_mathtext(" · ".join(notes)), fontsize=8, color="#555555")


def _plot_group(
    axis: Any, group: str, values: Sequence[Share], count: int, findings: Sequence[Finding], label: str
) -> None:
    failed = any(finding.passed is False for finding in findings)
    colour = "#D55E00" if failed else "#0072B2"
    positions = list(range(len(values)))
    share = [value.share for value in values]
    spread = [[v.share - v.low for v in values], [v.high - v.share for v in values]]
    axis.barh(positions, share, color=colour, alpha=0.35, height=0.65)
    axis.errorbar(
        share, positions, xerr=spread, fmt="o", color=colour, markersize=3.5, capsize=2.5, linewidth=1.2
    )
    axis.axvline(1 / count, color="#000000", linestyle=":", linewidth=1)
    axis.set_yticks(positions, [escape_mathtext(value.value) for value in values])
    axis.invert_yaxis()
    axis.set_xlim(0, max(1.05 * max(value.high for value in values), 1.1 / count))
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axis.spines[["top", "right"]].set_visible(False)
    title = escape_mathtext(" · ".join([group, *_title_parts(findings, label)]))
    hidden = count - len(values)
    axis.set_title(
        title + (f" · {hidden} more not shown" if hidden else ""), fontsize=9, loc="left", color="#000000"
    )


def _title_parts(findings: Sequence[Finding], label: str) -> Iterator[str]:
    for finding in findings:
        if finding.value is None or finding.kind == "rejection":
            continue
        sign = "≥" if finding.kind == "representation" else "≤"
        name = "smallest / largest" if finding.kind == "representation" else f"association with {label}"
        limit = f" ({sign} {finding.threshold:.2f} required)" if finding.threshold is not None else ""
        verdict = {"failed": " FAILED", "passed": "", "not_judged": ", not judged"}[finding.status]
        yield f"{name} {finding.value:.2f}{limit}{verdict}"
