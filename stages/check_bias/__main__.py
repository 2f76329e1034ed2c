"""Check bias: representation and outcome by group in the curated rows; a breach stops the pipeline.

In: `artifacts/curate/rows.parquet` and `rejects.jsonl`; `stages/common/privacy/people.csv`.
Out: `reports/check_bias/metrics.json` (each finding, with a sentence for the model card) and `groups.svg`,
written before the stage fails.
Run: `python -m stages.check_bias`

Groups are people (by the names in the prompts, with the gender and origin of the lexicon), fields of the rows
(source, license, origin) and tags, as `check_bias.groups` in `params.yaml` lists them.
"""

from __future__ import annotations

import logging
from dataclasses import asdict

from stages.check_bias.findings import Limits, check_groups, name_outcome
from stages.check_bias.groups import read_people, read_rejected_rows
from stages.check_bias.plots import plot_groups
from stages.common.artifacts import artifacts, reports, write_json
from stages.common.errors import InputError
from stages.common.logs import get_logger, run_stage
from stages.common.params.loading import load_params
from stages.common.records import read_rows
from stages.common.task.kinds import read_task

logger = get_logger("check_bias")


def main() -> None:
    """Check the curated rows, write the reports, then fail if a finding failed."""
    params = load_params().check_bias
    task = read_task()
    kept = read_rows(artifacts("curate") / "rows.parquet")
    rejected = read_rejected_rows(artifacts("curate") / "rejects.jsonl")
    findings, shares = check_groups(
        kept,
        rejected,
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
        "outcome": name_outcome(task),
        "permutations": params.permutations,
        "rows": len(kept),
        "rows_rejected_by_curate": len(rejected),
        "success": not failed,
    }
    folder = reports("check_bias")
    write_json(folder / "metrics.json", evidence)
    plot_groups(shares, findings, task.class_name or "length", folder / "groups.svg")
    for finding in findings:
        logger.log(logging.ERROR if finding.passed is False else logging.INFO, "%s", finding.statement)
    if failed:
        raise InputError(
            "the rows are not balanced:\n" + "\n".join(f"- {finding.statement}" for finding in failed),
            "add rows of the groups that have too few, or rewrite those of groups with one outcome; if the "
            "imbalance is intended, change check_bias.groups in params.yaml "
            f"({folder / 'metrics.json'} has all numbers)",
        )


if __name__ == "__main__":
    run_stage(main)
