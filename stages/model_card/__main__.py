"""Model card: what the model is, its training data, its results and its limits, from measured evidence only.

In: `reports/*/metrics.json` of every stage before, `artifacts/split`, `artifacts/finetune`, `dvc.lock`, git,
and the section `model_card` of `params.yaml` for what cannot be measured (the intended use).
Out: `reports/model_card/README.md` in the Hugging Face format, with its plots in the same folder.
Run: `dvc repro model_card`, or `python -m stages.model_card` after a `dvc repro`

A metric that is missing, or that contradicts another, fails the stage; one message lists all problems.
The card has no dates and no speeds, so identical runs write identical cards.
"""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from pprint import pformat
from typing import Any

from stages.common.artifacts import artifacts, atomic_dir, reports, write_text
from stages.common.chat.plain import NOTHING_HIDDEN, write_conversation, write_tools
from stages.common.errors import InputError
from stages.common.licenses import to_spdx
from stages.common.logs import get_logger, run_stage
from stages.common.model.adapter import HEAD, PEFT_METHODS, find_weights
from stages.common.params.loading import load_params
from stages.common.records import Row
from stages.common.repository.dvc_lock import Lock, read_lock
from stages.common.spool import join
from stages.model_card.checks import (
    NEEDED,
    check_adapter,
    check_licenses,
    check_lock,
    check_metrics,
    check_plots,
    check_rows,
)
from stages.model_card.evidence import (
    BEFORE,
    SIDES,
    Evidence,
    find_metric,
    list_plots,
    read_adapter,
    read_evidence,
    read_revision,
    read_sides,
)
from stages.model_card.sections import (
    build_metadata,
    count_sources,
    describe_adapter,
    describe_limits,
    describe_measured,
    describe_preferences,
    describe_sampled,
    describe_start,
    list_languages,
    list_lineage,
    list_params,
    list_results,
    list_smaller_models,
    name_objective,
    render_card,
)

logger = get_logger("model_card")

NOT_STATED = "not stated."


def list_recorded(plots: Mapping[str, Path]) -> list[Path]:
    """Return the files that must be those that DVC recorded."""
    return [
        *(reports(stage) / "metrics.json" for stage in BEFORE),
        *(artifacts(stage) for stage in ("fetch_base", "split", "finetune")),
        *(artifacts("split") / f"{side}.parquet" for side in SIDES),
        *plots.values(),
    ]


def raise_problems(problems: Sequence[str]) -> None:
    """Raise one InputError with all problems, if there are any."""
    if not problems:
        return
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise InputError(
        f"{count} with the evidence for the model card\n" + "\n".join(f"- {problem}" for problem in problems),
        "dvc repro model_card makes what is missing or out of date; correct a licence in params.yaml",
    )


def describe_training(
    evidence: Evidence, sides: Mapping[str, Sequence[Row]], adapter: Mapping[str, Any], lock: Lock
) -> dict[str, Any]:
    """Return what the template shows of the evidence, by the template's names."""
    example = sides["test"][0]
    tools = write_tools(NOTHING_HIDDEN, example.tools)
    return {
        **evidence,
        "sources": count_sources(sides),
        "sides": {side: len(sides[side]) for side in SIDES},
        "results": list_results(evidence["evaluate"]),
        "smaller": list_smaller_models(evidence["compress"]),
        "limits": describe_limits(evidence),
        "recipe": lock.params["finetune"],
        "all_params": json.dumps(list_params(lock), indent=2, ensure_ascii=False),
        "lineage": list_lineage(lock),
        "revision": read_revision(),
        "adapter": describe_adapter(adapter),
        "start": describe_start(lock.params["finetune"]),
        "weights": find_weights(artifacts("finetune")),
        "objective": name_objective(evidence["finetune"]),
        "preferences": describe_preferences(evidence["evaluate"]),
        "preferences_measured": describe_measured(evidence["finetune"].get("held_out")),
        "sampled": describe_sampled(evidence["finetune"].get("figures")),
        "is_peft": adapter["method"] in PEFT_METHODS,
        "labels": list(adapter["labels"]) if adapter["method"] == HEAD else None,
        "example_messages": _write_literal(write_conversation(NOTHING_HIDDEN, example.prompt)),
        "example_tools": _write_literal(tools) if tools else None,
        "example_answer": example.answer,
    }


def _write_literal(value: Any) -> str:
    """Return a value as Python code: as JSON, which it is where it has only texts, else in Python's words."""
    text = json.dumps(value, indent=4, ensure_ascii=False)
    try:
        return text if ast.literal_eval(text) == value else pformat(value, sort_dicts=False)
    except ValueError:  # true, false or null
        return pformat(value, sort_dicts=False)


def main() -> None:
    """Check the evidence, then write the card."""
    params = load_params().model_card
    lock = read_lock(BEFORE)
    evidence, problems = read_evidence()
    sides, unreadable_rows = read_sides()
    adapter, unreadable_adapter = read_adapter()
    plots = list_plots(evidence)
    raise_problems(
        [
            *problems,
            *unreadable_rows,
            *unreadable_adapter,
            *check_metrics(evidence),
            *check_plots(plots),
            *check_rows(sides, evidence, lock.params.get("validate", {}).get("allowed_licenses", ())),
            *check_adapter(adapter, lock),
            *check_lock(lock, list_recorded(plots)),
            *check_licenses(
                {
                    "the model (model_card.license)": params.license,
                    "the base model": find_metric(evidence, "fetch_base.license"),
                }
            ),
        ]
    )

    license = to_spdx(params.license) or params.license
    rows = join(join(sides["train"], sides["validation"]), sides["test"])
    language = params.language or list_languages(rows)
    metadata = build_metadata(
        params.name,
        license,
        language,
        evidence,
        rows,
        lock.hash_of(artifacts("split") / "test.parquet"),
    )
    body = render_card(
        {
            **describe_training(evidence, sides, adapter, lock),
            "name": params.name,
            "license": license,
            "language": language,
            "intended_use": (params.intended_use or NOT_STATED).strip(),
            "out_of_scope": (params.out_of_scope or NOT_STATED).strip(),
            "plots": sorted(plots),
        }
    )
    with atomic_dir(reports("model_card")) as folder:
        for name, path in plots.items():
            shutil.copyfile(path, folder / name)
        write_text(folder / "README.md", f"---\n{metadata.to_yaml()}\n---\n\n{body}")
    logger.info("%s: %d metrics agree", reports("model_card") / "README.md", len(NEEDED))


if __name__ == "__main__":
    run_stage(main)
