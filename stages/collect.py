"""Collect: bring the sources that `params.yaml` names into one table of records.

In: `collect.sources`: the packaged ones (`home_intents`, `home_tools`), files under `data/`, feedback from
production.
Out: `artifacts/collect/rows.parquet`, and `rejects.jsonl` with every rejected row, its file, line and reason;
`reports/collect/metrics.json` with the counts.
Run: `python -m stages.collect`
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stages.common.artifacts import artifacts, reports, write_json, write_lines
from stages.common.errors import InputError
from stages.common.logs import get_logger, run_stage, show_count
from stages.common.params.loading import load_params
from stages.common.params.stages import Feedback, File, HomeIntents, HomeTools, Source
from stages.common.records import Row, write_rows
from stages.common.sources import Collected, Rejected
from stages.common.sources.feedback import collect_feedback
from stages.common.sources.files.formats import FormatOptions
from stages.common.sources.files.rows import OnBadRow, collect_file
from stages.common.sources.files.shapes import Columns

logger = get_logger("collect")


def name_source(source: Source) -> str:
    """Return the name of a source in the report."""
    if isinstance(source, HomeIntents):
        return f"{source.kind} {source.version} {source.language}"
    if isinstance(source, HomeTools):
        return f"{source.kind} {source.version}"
    return source.path


def collect_source(source: Source, system_prompt: str | None, on_bad_row: OnBadRow) -> Collected:
    """Read one source.

    Raises:
        InputError: the source is missing or broken, or has no row; feedback may be missing.
    """
    if isinstance(source, Feedback):
        return collect_feedback(Path(source.path), system_prompt, on_bad_row)
    if isinstance(source, File):
        options, columns = FormatOptions.of(source), Columns.of(source)
        return collect_file(
            Path(source.path),
            source.license,
            source.origin,
            options,
            columns,
            system_prompt,
            on_bad_row,
            lambda done: show_count(logger, done, f"rows of {source.path} read"),
        )
    if isinstance(source, HomeTools):
        from stages.common.sources.home_tools.collect import collect_home_tools

        return collect_home_tools(
            version=source.version,
            rows_per_tool=source.rows_per_tool,
            rows_per_pair=source.rows_per_pair,
            rows_per_family=source.rows_per_family,
            seed=source.seed,
            system_prompt=system_prompt,
        )
    from stages.common.sources.home_intents.collect import collect_home_intents

    return collect_home_intents(
        version=source.version,
        language=source.language,
        rows_per_template=source.rows_per_template,
        min_rows_per_intent=source.min_rows_per_intent,
        seed=source.seed,
        system_prompt=system_prompt,
        reserved_share=source.reserved_share,
    )


def count_rows(named: Sequence[tuple[str, Collected]]) -> dict[str, Any]:
    """Return the counts of the report: in all, and by source."""
    licenses: Counter[str] = Counter()
    origins: Counter[str] = Counter()
    groups = set()
    for row in chain_rows(named):
        licenses[row.license] += 1
        origins[row.origin] += 1
        groups.add(row.group)
    return {
        "rows": sum(len(collected.rows) for _, collected in named),
        "rejected": sum(len(collected.rejected) for _, collected in named),
        "groups": len(groups),
        "by_license": dict(sorted(licenses.items())),
        "by_origin": dict(sorted(origins.items())),
        "rejected_by_reason": count_values(reject.reason for reject in chain_rejected(named)),
        "sources": [
            {
                "name": name,
                "rows": len(collected.rows),
                "rejected_by_reason": count_values(reject.reason for reject in collected.rejected),
                **collected.metrics,
            }
            for name, collected in named
        ],
    }


def count_values(values: Any) -> dict[str, int]:
    """Return how often each value occurs, by value."""
    return dict(sorted(Counter(values).items()))


def chain_rows(named: Sequence[tuple[str, Collected]]) -> Iterator[Row]:
    """Yield the rows of all sources."""
    return (row for _, collected in named for row in collected.rows)


def chain_rejected(named: Sequence[tuple[str, Collected]]) -> Iterator[Rejected]:
    """Yield the rejected entries of all sources."""
    return (reject for _, collected in named for reject in collected.rejected)


def format_rejected(rejected: Iterable[Rejected]) -> Iterator[str]:
    """Yield one JSON object a line: file, line, reason, detail, content."""
    return (json.dumps(asdict(reject), ensure_ascii=False) + "\n" for reject in rejected)


def main() -> None:
    """Read all sources, then write the rows, the rejected entries and the counts."""
    everything = load_params()
    params, system_prompt = everything.collect, everything.task.system_prompt
    named: list[tuple[str, Collected]] = []
    for source in params.sources:
        collected = collect_source(source, system_prompt, params.on_bad_row)
        name = name_source(source)
        # No one has given feedback yet: the source is not broken.
        if not collected.rows and not isinstance(source, Feedback):
            raise InputError(
                f"{name} has no row", "correct the source, or remove its entry from collect.sources"
            )
        reasons = ", ".join(
            f"{n} {reason}" for reason, n in count_values(r.reason for r in collected.rejected).items()
        )
        logger.info("%s: %d rows%s", name, len(collected.rows), f", rejected: {reasons}" if reasons else "")
        if columns := collected.metrics.get("columns"):
            logger.info(
                "%s: columns %s", name, ", ".join(f"{part}={column}" for part, column in columns.items())
            )
        if above := collected.metrics.get("lines_above_header"):
            logger.info("%s: %d lines above the header skipped", name, above)
        if forms := collected.metrics.get("forms"):
            logger.info("%s: %s", name, ", ".join(f"{form} ({n} rows)" for form, n in forms.items()))
        if unread := collected.metrics.get("unread_columns"):
            logger.warning(
                "%s: not read: %s", name, ", ".join(f"{column} ({n} rows)" for column, n in unread.items())
            )
        named.append((name, collected))
    if not any(collected.rows for _, collected in named):
        raise InputError("the sources have no row", "add one that has some to collect.sources")
    folder = artifacts("collect")
    write_lines(folder / "rejects.jsonl", format_rejected(chain_rejected(named)))
    write_rows(folder / "rows.parquet", chain_rows(named))
    counts = count_rows(named)
    write_json(reports("collect") / "metrics.json", counts)
    if counts["rejected"]:
        logger.warning("%d rejected, in %s", counts["rejected"], folder / "rejects.jsonl")


if __name__ == "__main__":
    run_stage(main)
