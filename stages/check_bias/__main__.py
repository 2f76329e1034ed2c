"""Measure representation and outcome balance by group in the curated rows; a breach stops the pipeline.

Groups are people (by the names in the prompts, with the lexicon's gender and origin), the rows' own fields
(source, license, origin) and any tag of the rows, as listed in params.yaml.

Enters: artifacts/curate/rows.parquet and rejects.jsonl, stages/common/people.csv, the section
`check_bias` of params.yaml.
Leaves: reports/check_bias/metrics.json (every finding, with a sentence for the model card) and groups.svg.
They are written before the stage fails.
Run: python -m stages.check_bias
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from stages.common.artifacts import artifacts, missing, read_lines, reports, write_bytes, write_json
from stages.common.association import codes_of, cramers_v, holm, permutation_p
from stages.common.errors import InputError
from stages.common.logs import get_logger, run_stage
from stages.common.params.loading import load_params
from stages.common.records import Message, Row, read_rows
from stages.common.statistics import wilson
from stages.common.svg import escape_label
from stages.common.task.kinds import read_task
from stages.common.task.protocol import Task

logger = get_logger("check_bias")

LEXICON = Path(__file__).parents[1] / "common" / "people.csv"
PERSON_PREFIX = "person_"  # person_gender, person_origin: columns of the lexicon
FIELDS = ("source", "license", "origin")

MAX_DRAWN_VALUES = 12  # of one group in the picture


@dataclass(frozen=True, slots=True)
class Limits:
    """What a group is held to; None measures and does not judge."""

    min_representation_ratio: float | None
    max_cramers_v: float | None


@dataclass(frozen=True, slots=True)
class Share:
    """One value of a group: its rows, their share of the rows that have any value, Wilson's 95 % interval."""

    value: str
    rows: int
    share: float
    low: float
    high: float
    rejected: int
    rejected_share: float


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found, in numbers and in words.

    Attributes:
        kind: representation (smallest over largest group), outcome or rejection (Cramer's V).
        status: passed, failed, not_judged (too few rows, one value, no threshold) or not_present.
        passed: None where nothing was judged.
        p_value: corrected by Holm over all ties tested; None for representation.
    """

    group: str
    kind: str
    status: str
    passed: bool | None
    value: float | None
    threshold: float | None
    p_value: float | None
    rows: int
    statement: str


def read_people(path: Path = LEXICON) -> dict[str, dict[str, str]]:
    """Return the gender and origin of each given name in the lexicon.

    Raises:
        InputError: a column is not there, a cell is empty, or a name stands twice.
    """
    with path.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines)
        lacking = {"name", "gender", "origin"} - set(reader.fieldnames or ())
        if lacking:
            raise InputError(
                f"{path} has no column {', '.join(sorted(lacking))}", "give it name,gender,origin"
            )
        people: dict[str, dict[str, str]] = {}
        problems = []
        for number, record in enumerate(reader, start=2):
            name = _normal(record["name"] or "")
            if not all((name, record["gender"], record["origin"])):
                problems.append(f"{path}:{number}: an empty cell")
            elif name in people:
                problems.append(f"{path}:{number}: {name} stands twice")
            else:
                people[name] = {"gender": record["gender"], "origin": record["origin"]}
    if problems:
        raise InputError("\n".join(problems), "give each name once, with a gender and an origin")
    return people


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def values_of(
    rows: Sequence[Row], group: str, people: Mapping[str, Mapping[str, str]]
) -> list[tuple[str, ...]]:
    """Return the values of `group` in each row: none, one, or several where a prompt names several people.

    A tag of that name decides. Else `person_gender` and `person_origin` are read off the names in the
    user's messages: whole words, with their capital, because many names are also words (Hung, Robin, Noel).
    """
    if group in FIELDS:
        return [(str(getattr(row, group)),) for row in rows]
    column = group.removeprefix(PERSON_PREFIX)
    reads_names = group.startswith(PERSON_PREFIX) and any(column in person for person in people.values())
    if not reads_names:
        return [(row.tags[group],) if group in row.tags else () for row in rows]
    longest_first = sorted(people, key=len, reverse=True)
    names = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")
    found: list[tuple[str, ...]] = []
    for row in rows:
        if group in row.tags:
            found.append((row.tags[group],))
            continue
        text = _normal("\n".join(m.content for m in row.prompt if m.role == "user"))
        found.append(tuple(sorted({people[name][column] for name in names.findall(text)})))
    return found


def known_values(group: str, people: Mapping[str, Mapping[str, str]]) -> set[str]:
    """Return the values that the lexicon knows for a group of people: one of them may be wholly absent."""
    column = group.removeprefix(PERSON_PREFIX)
    if not group.startswith(PERSON_PREFIX):
        return set()
    return {person[column] for person in people.values() if column in person}


def outcomes_of(rows: Sequence[Row], task: Task) -> list[str]:
    """Return each row's outcome: the class of its answer, or the quarter that the answer's length is in."""
    if task.class_name is not None:
        return [task.read_class(row.answer) or "(no class)" for row in rows]
    lengths = np.array([len(row.answer) for row in rows])
    bounds = np.quantile(lengths, [0.25, 0.5, 0.75]) if len(rows) else []
    names = ("shortest quarter", "second quarter", "third quarter", "longest quarter")
    return [names[quarter] for quarter in np.searchsorted(bounds, lengths, side="left")]


def shares_of(
    kept: Sequence[tuple[str, ...]], dropped: Sequence[tuple[str, ...]], expected: set[str]
) -> list[Share]:
    """Return every value's share, the largest first; a value that was expected and is absent has none."""
    counts = Counter(value for values in kept for value in values)
    rejected = Counter(value for values in dropped for value in values)
    total = sum(1 for values in kept if values)
    return [
        Share(
            value=value,
            rows=counts[value],
            share=counts[value] / total if total else 0.0,
            low=wilson(counts[value], total)[0],
            high=wilson(counts[value], total)[1],
            rejected=rejected[value],
            rejected_share=rejected[value] / (rejected[value] + counts[value] or 1),
        )
        for value in sorted({*counts, *rejected, *expected}, key=lambda name: (-counts[name], name))
    ]


def representation(group: str, shares: Sequence[Share], rows: int, limits: Limits, min_rows: int) -> Finding:
    """Judge the smallest value's rows over the largest value's."""
    threshold = limits.min_representation_ratio
    finding = Finding(group, "representation", "not_judged", None, None, threshold, None, rows, "")
    if rows == 0:
        return _not_present(finding)
    if len(shares) == 1:
        text = f"{group}: all {_rows(rows)} are {shares[0].value!r}; nothing is known about any other."
        return replace(finding, statement=text)
    largest, smallest = shares[0], shares[-1]
    ratio = smallest.rows / largest.rows
    text = (
        f"{group}: of {_rows(rows)} with a value, {smallest.value} has fewest ({_share(smallest)}) and "
        f"{largest.value} most ({_share(largest)}); ratio {ratio:.2f}"
    )
    return _judged(replace(finding, value=ratio), text, min_rows, lambda limit: ratio >= limit, "at least")


@dataclass(frozen=True, slots=True)
class Tie:
    """How strongly a group's values go with an outcome, before the p-values are corrected."""

    group: str
    kind: str
    rows: int
    limit: float | None
    v: float | None
    p_value: float | None


def tie_of(
    group: str,
    kind: str,
    found: Sequence[tuple[str, ...]],
    outcomes: Sequence[str],
    clusters: Sequence[str],
    limit: float | None,
    min_rows: int,
    permutations: int,
    seed: int,
) -> Tie:
    """Measure the tie of a group's values to the outcomes; a row with two values counts once for each.

    V and p are None where there are not two values and two outcomes to compare, and p where the rows are
    too few to judge.
    """
    positions = [index for index, values in enumerate(found) for _ in values]
    values = [value for row_values in found for value in row_values]
    rows = sum(1 for row_values in found if row_values)
    paired = [outcomes[position] for position in positions]
    if len(set(values)) < 2 or len(set(paired)) < 2:
        return Tie(group, kind, rows, limit, None, None)
    table = np.zeros((len(set(values)), len(set(paired))), dtype=np.int64)
    np.add.at(table, (codes_of(values), codes_of(paired)), 1)
    p_value = None
    if rows >= min_rows:
        p_value = permutation_p(values, paired, [clusters[p] for p in positions], permutations, seed)
    return Tie(group, kind, rows, limit, cramers_v(table), p_value)


def judge_ties(ties: Sequence[Tie], outcome_name: str, alpha: float, min_rows: int) -> list[Finding]:
    """Judge every tie: it fails when it is stronger than its limit and chance does not explain it."""
    tested = [index for index, tie in enumerate(ties) if tie.p_value is not None]
    corrected = dict(zip(tested, holm([ties[index].p_value or 0.0 for index in tested]), strict=True))
    findings = []
    for index, tie in enumerate(ties):
        p_value = corrected.get(index)
        finding = Finding(tie.group, tie.kind, "not_judged", None, tie.v, tie.limit, p_value, tie.rows, "")
        what = outcome_name if tie.kind == "outcome" else "being dropped by curate"
        if tie.rows == 0:
            findings.append(_not_present(finding))
        elif tie.v is None:
            text = f"{tie.group} and {what}: there are no two values with two outcomes to compare."
            findings.append(replace(finding, statement=text))
        else:
            text = f"{tie.group} and {what}: tie of strength {tie.v:.2f} (Cramer's V, {_rows(tie.rows)}"
            text += f", p = {p_value:.3f})" if p_value is not None else ")"
            likely_chance = p_value is not None and p_value >= alpha
            if likely_chance:
                text += ", no more than chance gives"
            findings.append(
                _judged(
                    finding,
                    text,
                    min_rows,
                    lambda limit, t=tie, c=likely_chance: c or t.v <= limit,
                    "at most",
                )
            )
    return findings


def _judged(finding: Finding, text: str, min_rows: int, holds: Any, word: str) -> Finding:
    """Add the verdict and its words; too few rows or no threshold leave it open."""
    if finding.threshold is None:
        return replace(finding, statement=f"{text}. Reported only: no threshold is set.")
    limit = f"{word} {finding.threshold:.2f} is asked"
    if finding.rows < min_rows:
        return replace(finding, statement=f"{text}. Not judged ({limit}): fewer than {_rows(min_rows)}.")
    passed = bool(holds(finding.threshold))
    status = "passed" if passed else "failed"
    return replace(finding, status=status, passed=passed, statement=f"{text}; {limit}: {status}.")


def _not_present(finding: Finding) -> Finding:
    text = f"{finding.group}: not present. No row has a value, so {finding.kind} could not be checked."
    return replace(finding, status="not_present", statement=text)


def _rows(count: int) -> str:
    return f"{count:,} row" + "s" * (count != 1)


def _share(share: Share) -> str:
    return f"{_rows(share.rows)}, {share.share:.1%}, 95 % interval {share.low:.1%} to {share.high:.1%}"


def picture(shares: Mapping[str, Sequence[Share]], findings: Sequence[Finding], label: str) -> bytes:
    """Draw each group's shares with their intervals; the same input gives the same bytes.

    Colours are Okabe & Ito's, told apart with any colour vision; a failed group is also marked by its words.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    drawn = {group: list(values)[:MAX_DRAWN_VALUES] for group, values in shares.items() if len(values) > 1}
    notes = [
        f"{group}: not present" if not values else f"{group}: only {values[0].value}"
        for group, values in shares.items()
        if len(values) < 2
    ]
    heights = [0.9 + 0.28 * len(values) for values in drawn.values()] or [0.5]
    with rc_context({"svg.hashsalt": "check_bias", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(7.5, sum(heights) + 0.9), layout="constrained")
        figure.suptitle(
            "Share of the rows that have a value, with 95 % intervals (dotted: equal shares)", fontsize=10
        )
        axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axis, (group, values) in zip(axes, drawn.items(), strict=False):
            _draw_group(
                axis, group, values, len(shares[group]), [f for f in findings if f.group == group], label
            )
        if not drawn:
            axes[0].set_axis_off()
        if notes:
            figure.supxlabel(" · ".join(notes), fontsize=8, color="#555555")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _draw_group(
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
    axis.set_yticks(positions, [escape_label(value.value) for value in values])
    axis.invert_yaxis()
    axis.set_xlim(0, max(1.05 * max(value.high for value in values), 1.1 / count))
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axis.spines[["top", "right"]].set_visible(False)
    title = " · ".join([group, *_title_parts(findings, label)])
    hidden = count - len(values)
    axis.set_title(
        title + (f" · {hidden} more not drawn" if hidden else ""), fontsize=9, loc="left", color="#000000"
    )


def _title_parts(findings: Sequence[Finding], label: str) -> Iterator[str]:
    for finding in findings:
        if finding.value is None or finding.kind == "rejection":
            continue
        sign = "≥" if finding.kind == "representation" else "≤"
        name = "smallest / largest" if finding.kind == "representation" else f"tie to {label}"
        limit = f" ({sign} {finding.threshold:.2f} asked)" if finding.threshold is not None else ""
        verdict = {"failed": " FAILED", "passed": "", "not_judged": ", not judged"}[finding.status]
        yield f"{name} {finding.value:.2f}{limit}{verdict}"


def read_rejects(path: Path) -> list[Row]:
    """Read the rows that curate dropped.

    Raises:
        InputError: the file is not there.
    """
    if not path.exists():
        raise missing(path)
    rows = []
    for line in read_lines(path):
        row = json.loads(line)["row"]
        messages = tuple(Message(m["role"], m["content"]) for m in row["messages"])
        rows.append(Row(**{**row, "messages": messages}))
    return rows


def check(
    kept: Sequence[Row],
    dropped: Sequence[Row],
    people: Mapping[str, Mapping[str, str]],
    *,
    groups: Mapping[str, Limits],
    task: Task,
    min_rows: int,
    alpha: float,
    permutations: int,
    seed: int,
) -> tuple[list[Finding], dict[str, list[Share]]]:
    """Return every finding and every value's share, group by group."""
    outcomes = outcomes_of(kept, task)
    fates = ["kept"] * len(kept) + ["dropped"] * len(dropped)
    findings: list[Finding] = []
    ties: list[Tie] = []
    shares: dict[str, list[Share]] = {}
    for group, limits in groups.items():
        found, lost = values_of(kept, group, people), values_of(dropped, group, people)
        rows = sum(1 for values in found if values)
        shares[group] = shares_of(found, lost, known_values(group, people) if rows else set())
        findings.append(representation(group, shares[group], rows, limits, min_rows))
        fixed = (limits.max_cramers_v, min_rows, permutations, seed)
        ties.append(tie_of(group, "outcome", found, outcomes, [row.group for row in kept], *fixed))
        all_groups = [row.group for row in (*kept, *dropped)]
        ties.append(tie_of(group, "rejection", [*found, *lost], fates, all_groups, *fixed))
    name = task.class_name or "the answer's length"
    findings += judge_ties(ties, name, alpha, min_rows)
    order = list(groups)
    return sorted(findings, key=lambda finding: order.index(finding.group)), shares


def main() -> None:
    """Check the curated rows, write the reports, then fail if a threshold was crossed."""
    params = load_params().check_bias
    task = read_task()
    kept = read_rows(artifacts("curate") / "rows.parquet")
    dropped = read_rejects(artifacts("curate") / "rejects.jsonl")
    findings, shares = check(
        kept,
        dropped,
        read_people(),
        groups={name: Limits(**limits.model_dump()) for name, limits in params.groups.items()},
        task=task,
        min_rows=params.min_rows,
        alpha=params.alpha,
        permutations=params.permutations,
        seed=params.seed,
    )
    failed = [finding for finding in findings if finding.passed is False]
    evidence = {
        "alpha": params.alpha,
        "failed": len(failed),
        "findings": [asdict(finding) for finding in findings],
        "groups": {group: [asdict(share) for share in values] for group, values in shares.items()},
        "judged": sum(finding.passed is not None for finding in findings),
        "min_rows": params.min_rows,
        "outcome": task.class_name or "the answer's length",
        "permutations": params.permutations,
        "rows": len(kept),
        "rows_dropped_by_curate": len(dropped),
        "success": not failed,
    }
    folder = reports("check_bias")
    write_json(folder / "metrics.json", evidence)
    write_bytes(folder / "groups.svg", picture(shares, findings, task.class_name or "length"))
    for finding in findings:
        logger.log(logging.ERROR if finding.passed is False else logging.INFO, "%s", finding.statement)
    if failed:
        raise InputError(
            "the rows are out of balance:\n" + "\n".join(f"- {finding.statement}" for finding in failed),
            "add rows of the groups that come short, or reword those that go with one outcome; or, knowing "
            f"what it means, change check_bias.groups in params.yaml ({folder / 'metrics.json'} has every "
            "number)",
        )


if __name__ == "__main__":
    run_stage(main)
