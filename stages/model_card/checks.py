"""Check the evidence: every metric is there, sums agree, gates passed, files are those that DVC recorded."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.common.artifacts import artifacts, reports
from stages.common.licenses import to_spdx
from stages.common.model.adapter import name_adapter
from stages.common.records import Row, format_canonical_json
from stages.common.repository.dvc_lock import Lock, find_disagreements
from stages.model_card.evidence import BEFORE, SIDES, Evidence, find_metric

# Metrics without which there is no card. `a.b.c`: key c of key b of reports/a/metrics.json.
NEEDED = (
    *(f"fetch_base.{key}" for key in ("origin", "name", "revision", "file", "license")),
    *(f"fetch_base.{key}" for key in ("sha256", "parameters")),
    *(
        f"collect.{key}"
        for key in ("rows", "rejected", "rejected_by_reason", "by_license", "by_origin", "sources")
    ),
    *(f"curate.{key}" for key in ("rows_in", "kept", "rejected", "rejected_by_reason", "kept_by_source")),
    *(f"validate.{key}" for key in ("rows", "success", "expectations_met", "expectations_total", "warnings")),
    *(f"check_bias.{key}" for key in ("rows", "success", "findings")),
    *(f"split.rows.{side}" for side in SIDES),
    "split.test_answers",
    *(f"split.groups.{side}" for side in SIDES),
    *(f"split.{key}" for key in ("rows_in", "test_rows_over_cap", "train_rows_over_cap")),
    "split.train_rows_not_drawn",
    "split.train_rows_removed_as_near_duplicates",
    "split.rows_removed_as_known_answers",
    "curate.rows_changed",
    *(f"split.{key}" for key in ("feedback_rows", "feedback_rows_of_held_out_groups")),
    *(
        f"split.proof.{key}"
        for key in (
            *("groups_on_two_sides", "conversations_on_two_sides", "near_duplicates_across"),
            "highest_similarity",
        )
    ),
    *(f"finetune.{key}" for key in ("train_rows", "rejected_long_rows", "steps", "train_tokens", "dtype")),
    *(f"finetune.{key}" for key in ("rows_not_replayed", "started_from", "trained_parameters", "method")),
    "finetune.rejected_refused_rows",
    *(f"finetune.{key}" for key in ("train_loss", "validation_loss")),
    *(f"evaluate.{key}" for key in ("rows", "test_rows", "groups", "base", "tuned", "difference", "slices")),
    *(f"evaluate.{key}" for key in ("primary", "task", "confidence", "resamples", "confusions", "metrics")),
    *(f"evaluate.errors.{key}" for key in ("rows", "by_type", "right_in_base_only")),
    "evaluate.resolution.statement",
    *(f"compress.{key}" for key in ("models", "chosen", "choice")),
    *(f"evaluate.{key}" for key in ("answer_limit_tokens", "references_over_limit")),
)

# These may be null: a folder has no revision, a hub id no file, a split without validation rows no loss;
# and mostly the exported model goes on.
MAY_BE_NULL = ("fetch_base.revision", "fetch_base.file", "finetune.validation_loss", "compress.chosen")

# Sums that must agree; `a.b.*` is the sum over all keys of a.b.
AGREEMENTS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("collect.by_license.*",), ("collect.rows",)),
    (("collect.by_origin.*",), ("collect.rows",)),
    (("collect.rows",), ("curate.rows_in",)),
    (("curate.kept", "curate.rejected"), ("curate.rows_in",)),
    (("curate.rejected_by_reason.*",), ("curate.rejected",)),
    (("curate.kept_by_source.*",), ("curate.kept",)),
    (("validate.rows",), ("curate.kept",)),
    (("check_bias.rows",), ("curate.kept",)),
    (("split.rows_in",), ("curate.kept",)),
    (
        (
            *("split.rows.*", "split.test_rows_over_cap", "split.train_rows_over_cap"),
            "split.train_rows_not_drawn",
            "split.train_rows_removed_as_near_duplicates",
            "split.rows_removed_as_known_answers",
            "split.feedback_rows_of_held_out_groups",
        ),
        ("split.rows_in",),
    ),
    (
        (
            *("finetune.train_rows", "finetune.rejected_long_rows", "finetune.rejected_refused_rows"),
            *("finetune.rows_not_replayed", "finetune.rows_without_preference", "finetune.rows_held_out"),
            *("finetune.prompts_without_room", "finetune.teacher_answers_left_out.*"),
        ),
        ("split.rows.train", "finetune.refused_rows_read"),
    ),
    (("evaluate.test_rows",), ("split.test_answers",)),
)

# Parts of these sums that only some methods of training have.
OF_SOME_METHODS = frozenset(
    f"finetune.{name}"
    for name in (
        *("rows_without_preference", "rows_held_out", "refused_rows_read"),
        *("prompts_without_room", "teacher_answers_left_out.*"),
    )
)

# Results that every pipeline run must have.
GATES = (
    ("validate.success", True),
    ("check_bias.success", True),
    ("split.proof.groups_on_two_sides", 0),
    ("split.proof.conversations_on_two_sides", 0),
    ("split.proof.near_duplicates_across", 0),
)


def check_metrics(evidence: Evidence) -> list[str]:
    """Return each metric that is missing, is not finite, fails a gate or contradicts another."""
    problems = []
    for name in NEEDED:
        stage, *keys = name.split(".")
        if stage not in evidence:
            continue
        if find_metric(evidence, name) is None and not (name in MAY_BE_NULL and keys[-1] in evidence[stage]):
            problems.append(f"{name} is missing from {reports(stage) / 'metrics.json'}")
    for pair in AGREEMENTS:
        left, right = (_list_parts(evidence, names) for names in pair)
        sums = [_sum(evidence, names) for names in (left, right)]
        if None not in sums and sums[0] != sums[1]:
            problems.append(f"{' + '.join(left)} is {sums[0]}, and {' + '.join(right)} is {sums[1]}")
    for name, wanted in GATES:
        found = find_metric(evidence, name)
        if found is not None and found != wanted:
            problems.append(f"{name} is {json.dumps(found)}, not {json.dumps(wanted)}")
    judged, chosen = (find_metric(evidence, name) for name in ("evaluate.compression", "compress.chosen"))
    if judged != chosen:
        problems.append(
            f"evaluate.compression is {json.dumps(judged)}, and compress.chosen {json.dumps(chosen)}"
        )
    for number, finding in enumerate(find_metric(evidence, "check_bias.findings") or ()):
        if not finding.get("statement"):
            problems.append(f"check_bias.findings.{number} has no statement")
    sources, rows = find_metric(evidence, "collect.sources"), find_metric(evidence, "collect.rows")
    if sources is not None and (listed := sum(source.get("rows", 0) for source in sources)) != rows:
        problems.append(f"the sources of collect have {listed} rows, and collect.rows is {rows}")
    return problems + _check_results(evidence.get("evaluate", {}))


def _list_parts(evidence: Evidence, names: Sequence[str]) -> list[str]:
    """Return the parts of a sum that the method of training has."""
    return [name for name in names if name not in OF_SOME_METHODS or find_metric(evidence, name) is not None]


def _sum(evidence: Evidence, names: Sequence[str]) -> int | None:
    found = [find_metric(evidence, name) for name in names]
    return None if None in found else sum(found)


def _check_results(report: Mapping[str, Any]) -> list[str]:
    """Return the problems within the metrics of evaluate."""
    if not {"base", "tuned", "difference", "rows", "primary", "test_rows"} <= report.keys():
        return []
    problems = []
    base, tuned, differences = report["base"], report["tuned"], report["difference"]
    if not base.keys() == tuned.keys() == differences.keys():
        return ["evaluate has other metrics for base, tuned and difference"]
    if report["primary"] not in tuned:
        problems.append(f"evaluate.primary is {report['primary']}, which is not one of its metrics")
    if report["rows"] > report["test_rows"]:
        problems.append(
            f"evaluate.rows is {report['rows']}, more than evaluate.test_rows ({report['test_rows']})"
        )
    for kind, metrics in (("base", base), ("tuned", tuned), ("difference", differences)):
        for name, found in metrics.items():
            where = f"evaluate.{kind}.{name}"
            values = [found.get(key) for key in ("value", "low", "high", "n")]
            if any(not isinstance(value, int | float) or not math.isfinite(value) for value in values):
                problems.append(f"{where} is not a number with an interval: {format_canonical_json(found)}")
                continue
            if found["low"] > found["high"]:
                problems.append(f"{where}.low is {found['low']}, above its high ({found['high']})")
            if found["n"] != report["rows"]:
                problems.append(f"{where}.n is {found['n']}, and evaluate.rows is {report['rows']}")
    problems += _check_preferences(report.get("preferences"))
    if problems:
        return problems
    for name, found in differences.items():
        expected = tuned[name]["value"] - base[name]["value"]
        # Each metric is rounded to six digits.
        if abs(found["value"] - expected) > 3e-6:
            problems.append(
                f"evaluate.difference.{name}.value is {found['value']}, and tuned minus base {expected:.6f}"
            )
    return problems


def _check_preferences(found: Mapping[str, Any] | None) -> list[str]:
    """Return the figures of the preference on test pairs that are no numbers with an interval."""
    if not found or "skipped" in found:
        return []
    return [
        f"evaluate.preferences.{kind}.{name} is not a number with an interval: {format_canonical_json(one)}"
        for kind in ("before", "tuned", "difference")
        for name, one in found[kind].items()
        if not all(math.isfinite(one[key]) for key in ("value", "low", "high")) or one["low"] > one["high"]
    ]


def check_rows(sides: Mapping[str, Sequence[Row]], evidence: Evidence, allowed: Sequence[str]) -> list[str]:
    """Return differences between the files and the report of the split, and licences that are not allowed."""
    problems = []
    for side, rows in sides.items():
        # On the test side each answer is a row.
        name = "split.test_answers" if side == "test" else f"split.rows.{side}"
        reported = find_metric(evidence, name)
        if reported is not None and reported != len(rows):
            problems.append(f"{side}.parquet of the split has {len(rows)} rows, and {name} is {reported}")
    licenses: dict[str, set[str]] = {}
    for rows in sides.values():
        for row in rows:
            licenses.setdefault(row.license, set()).add(row.source)
    known = {to_spdx(name) for name in allowed}
    for license, sources in sorted(licenses.items()):
        named = ", ".join(sorted(sources))
        if to_spdx(license) is None:
            problems.append(f"the licence {license!r} of {named} is not an SPDX expression")
        elif allowed and to_spdx(license) not in known:
            problems.append(f"the licence {license!r} of {named} is not in validate.allowed_licenses")
    return problems


def check_adapter(adapter: Mapping[str, Any], lock: Lock) -> list[str]:
    """Return differences between the adapter and what `fetch_base` and `finetune` should have made."""
    if not adapter:  # unreadable, which is a problem already
        return []
    problems = []
    base, folder = adapter["base"], artifacts("fetch_base").as_posix()
    if base != folder:
        problems.append(f"the adapter was trained on {base}, not on {folder} (its configuration)")
    finetune = lock.params.get("finetune", {})
    names = ("method", "rank", "alpha", "num_virtual_tokens")
    wanted = {name: finetune[name] for name in names if name in finetune}
    if "method" in wanted:
        wanted["method"] = name_adapter(wanted["method"])
    for name, value in wanted.items():
        if name in adapter and adapter[name] != value:
            problems.append(
                f"the adapter has {name} {adapter[name]}, and finetune.{name} was {finetune[name]}"
            )
    return problems


def check_lock(lock: Lock, paths: Sequence[Path]) -> list[str]:
    """Return the stages that DVC has not run, and files that differ from what it recorded."""
    absent = [stage for stage in BEFORE if stage not in lock.params]
    if len(absent) == len(BEFORE):
        return ["dvc.lock is missing or empty: DVC did not write the files here (dvc repro model_card)"]
    problems = [f"dvc.lock has no entry for {stage} (dvc repro {stage})" for stage in absent]
    return problems + find_disagreements(lock, paths)


def check_plots(plots: Mapping[str, Path]) -> list[str]:
    """Return the plots that are missing."""
    return [
        f"{path} does not exist (dvc repro {path.parts[1]})" for path in plots.values() if not path.is_file()
    ]


def check_licenses(licenses: Mapping[str, str | None]) -> list[str]:
    """Return the licences that are not SPDX expressions; keys name what each is the licence of."""
    return [
        f"the licence {license!r} of {what} is not an SPDX expression"
        for what, license in licenses.items()
        if license is not None and to_spdx(license) is None
    ]
