"""Model card: what the model is, learned from, is worth and gets wrong, from the evidence alone.

In: `reports/*/metrics.json` of every stage before, `artifacts/split`, `artifacts/finetune`, `dvc.lock`, git,
and the section `model_card` of `params.yaml` for what no measurement can say (what the model is for).
Out: `reports/model_card/README.md` in the Hugging Face format, with its pictures beside it.

A figure that is missing, or that disagrees with another, fails the stage; all problems are in one message.
Nothing in the card changes between identical runs: no dates, no speeds.

Run it with `dvc repro model_card`, or `python -m stages.model_card` after a `dvc repro`.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.common.artifacts import artifacts, atomic_dir, reports, write_text
from stages.common.dvc_lock import Lock, disagreements, read_lock
from stages.common.errors import InputError
from stages.common.licenses import to_spdx
from stages.common.logs import get_logger, run_stage
from stages.common.markdown import code
from stages.common.params.loading import load_params
from stages.common.records import Row, canonical_json, read_rows

log = get_logger("model_card")

TEMPLATE = Path(__file__).with_name("card.md.j2")
BEFORE = ("fetch_base", "collect", "curate", "validate", "check_bias", "split", "finetune", "evaluate")
SIDES = ("train", "validation", "test")
CODE = ("stages", "dvc.yaml", "params.yaml", "pyproject.toml", "requirements.lock")

# Figures without which there is no card. `a.b.c`: key c of key b of reports/a/metrics.json.
NEEDED = (
    *(f"fetch_base.{key}" for key in ("origin", "name", "revision", "file", "license")),
    *(f"fetch_base.{key}" for key in ("sha256", "parameters")),
    *(
        f"collect.{key}"
        for key in ("rows", "rejected", "rejected_by_reason", "by_license", "by_origin", "sources")
    ),
    *(f"curate.{key}" for key in ("rows_in", "kept", "dropped", "dropped_by_reason", "kept_by_source")),
    *(f"validate.{key}" for key in ("rows", "success", "expectations_met", "expectations_total", "warnings")),
    *(f"check_bias.{key}" for key in ("rows", "success", "findings")),
    *(f"split.rows.{side}" for side in SIDES),
    *(f"split.groups.{side}" for side in SIDES),
    *(f"split.{key}" for key in ("rows_in", "test_rows_over_cap", "train_rows_removed_as_near_duplicates")),
    *(f"split.{key}" for key in ("feedback_rows", "feedback_rows_of_held_out_groups")),
    *(
        f"split.proof.{key}"
        for key in ("groups_on_two_sides", "near_duplicates_across", "highest_similarity")
    ),
    *(f"finetune.{key}" for key in ("train_rows", "dropped_long_rows", "steps", "train_tokens", "dtype")),
    *(f"finetune.{key}" for key in ("rows_not_replayed", "started_from", "trained_parameters")),
    *(f"finetune.{key}" for key in ("train_loss", "validation_loss")),
    *(f"evaluate.{key}" for key in ("rows", "test_rows", "groups", "base", "tuned", "difference", "slices")),
    *(f"evaluate.{key}" for key in ("primary", "task", "confidence", "resamples", "confusions")),
    *(f"evaluate.errors.{key}" for key in ("rows", "by_kind", "right_in_base_only")),
    *(f"evaluate.{key}" for key in ("answer_limit_tokens", "references_over_limit")),
)
# These may be null: a folder has no revision, a hub id no file, a split without validation rows no loss.
MAY_BE_NULL = ("fetch_base.revision", "fetch_base.file", "finetune.validation_loss")

# Sums that must agree; `a.b.*` is the sum over all keys of a.b.
AGREEMENTS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("collect.by_license.*",), ("collect.rows",)),
    (("collect.by_origin.*",), ("collect.rows",)),
    (("collect.rows",), ("curate.rows_in",)),
    (("curate.kept", "curate.dropped"), ("curate.rows_in",)),
    (("curate.dropped_by_reason.*",), ("curate.dropped",)),
    (("curate.kept_by_source.*",), ("curate.kept",)),
    (("validate.rows",), ("curate.kept",)),
    (("check_bias.rows",), ("curate.kept",)),
    (("split.rows_in",), ("curate.kept",)),
    (
        (
            *("split.rows.*", "split.test_rows_over_cap", "split.train_rows_removed_as_near_duplicates"),
            "split.feedback_rows_of_held_out_groups",
        ),
        ("split.rows_in",),
    ),
    (
        ("finetune.train_rows", "finetune.dropped_long_rows", "finetune.rows_not_replayed"),
        ("split.rows.train",),
    ),
    (("evaluate.test_rows",), ("split.rows.test",)),
)

# What must have come out before there is anything to describe.
GATES = (
    ("validate.success", True),
    ("check_bias.success", True),
    ("split.proof.groups_on_two_sides", 0),
    ("split.proof.near_duplicates_across", 0),
)

# The names under which the Hugging Face hub knows our metrics.
HUB_METRICS = {"slot_f1": "f1", "rouge_l": "rouge"}
NOT_FOR_THE_HUB = ("finished", "answer_tokens")

# In the order of the table; the accuracy of the label, whose name depends on its key, comes second.
METRIC_MEANINGS = {
    "exact_match": "answers equal to the reference (JSON: as values, whatever the order of keys)",
    "": "answers with the right label",
    "valid_output": "answers that can be used at all: one JSON value of the right shape",
    "slot_f1": "micro-averaged F1 over the pairs of key and value other than the label",
    "rouge_l": "mean F1 of the longest common subsequence of words",
    "chrf": "corpus chrF2, 0 to 100",
    "bleu": "corpus BLEU, 0 to 100",
    "finished": "answers that end by themselves before the limit",
    "perplexity": "of the reference answers, by token; lower is better",
    "answer_tokens": "mean length of an answer in tokens",
}

WEAKEST_SHOWN = 5

Evidence = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Revision:
    """The state of the code: the commit, and which files of the code differ from it."""

    commit: str | None
    changed: tuple[str, ...] = ()


def read_evidence() -> tuple[Evidence, list[str]]:
    """Return what every stage reported, and which reports are missing or unreadable."""
    evidence: Evidence = {}
    problems = []
    for stage in BEFORE:
        path = reports(stage) / "metrics.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            problems.append(f"{path} is not there (dvc repro {stage})")
            continue
        except ValueError as error:
            problems.append(f"{path} is not JSON: {error}")
            continue
        evidence[stage] = found
    return evidence, problems


def figure(evidence: Evidence, name: str) -> Any:
    """Return the figure of that dotted name, or None."""
    found: Any = evidence
    for key in name.split("."):
        if key == "*":
            return sum(found.values()) if isinstance(found, dict) else None
        found = found.get(key) if isinstance(found, dict) else None
    return found


def check_figures(evidence: Evidence) -> list[str]:
    """Return every figure that is missing, is not finite, breaks a gate, or disagrees with another."""
    problems = []
    for name in NEEDED:
        stage, *keys = name.split(".")
        if stage not in evidence:
            continue
        if figure(evidence, name) is None and not (name in MAY_BE_NULL and keys[-1] in evidence[stage]):
            problems.append(f"{name} is missing from {reports(stage) / 'metrics.json'}")
    for left, right in AGREEMENTS:
        sums = [_sum(evidence, names) for names in (left, right)]
        if None not in sums and sums[0] != sums[1]:
            problems.append(f"{' + '.join(left)} is {sums[0]}, and {' + '.join(right)} is {sums[1]}")
    for name, wanted in GATES:
        found = figure(evidence, name)
        if found is not None and found != wanted:
            problems.append(f"{name} is {json.dumps(found)}, not {json.dumps(wanted)}")
    for number, finding in enumerate(figure(evidence, "check_bias.findings") or ()):
        if not finding.get("statement"):
            problems.append(f"check_bias.findings.{number} has no statement")
    sources = figure(evidence, "collect.sources")
    if sources is not None and (rows := sum(s.get("rows", 0) for s in sources)) != figure(
        evidence, "collect.rows"
    ):
        problems.append(
            f"the sources of collect have {rows} rows, and collect.rows is {evidence['collect']['rows']}"
        )
    return problems + _check_results(evidence.get("evaluate", {}))


def _sum(evidence: Evidence, names: Sequence[str]) -> int | None:
    found = [figure(evidence, name) for name in names]
    return None if None in found else sum(found)


def _check_results(report: Mapping[str, Any]) -> list[str]:
    """Return what is wrong within the figures of evaluate."""
    if not {"base", "tuned", "difference", "rows", "primary", "test_rows"} <= report.keys():
        return []
    problems = []
    base, tuned, differences = report["base"], report["tuned"], report["difference"]
    if not base.keys() == tuned.keys() == differences.keys():
        return ["evaluate has other metrics for base, tuned and difference"]
    if report["primary"] not in tuned:
        problems.append(f"evaluate.primary is {report['primary']}, which is none of its metrics")
    if report["rows"] > report["test_rows"]:
        problems.append(
            f"evaluate.rows is {report['rows']}, more than evaluate.test_rows ({report['test_rows']})"
        )
    for kind, figures in (("base", base), ("tuned", tuned), ("difference", differences)):
        for name, found in figures.items():
            where = f"evaluate.{kind}.{name}"
            values = [found.get(key) for key in ("value", "low", "high", "n")]
            if any(not isinstance(value, int | float) or not math.isfinite(value) for value in values):
                problems.append(f"{where} lacks a number: {canonical_json(found)}")
                continue
            if found["low"] > found["high"]:
                problems.append(f"{where}.low is {found['low']}, above its high ({found['high']})")
            if found["n"] != report["rows"]:
                problems.append(f"{where}.n is {found['n']}, and evaluate.rows is {report['rows']}")
    if problems:
        return problems
    for name, found in differences.items():
        expected = tuned[name]["value"] - base[name]["value"]
        # Each figure is rounded to six digits.
        if abs(found["value"] - expected) > 3e-6:
            problems.append(
                f"evaluate.difference.{name}.value is {found['value']}, and tuned minus base {expected:.6f}"
            )
    return problems


def check_rows(sides: Mapping[str, Sequence[Row]], evidence: Evidence, allowed: Sequence[str]) -> list[str]:
    """Return where the split's files and report disagree, and rows under a licence that is not allowed."""
    problems = []
    for side, rows in sides.items():
        reported = figure(evidence, f"split.rows.{side}")
        if reported is not None and reported != len(rows):
            problems.append(
                f"{side}.parquet of the split has {len(rows)} rows, and split.rows.{side} is {reported}"
            )
    licenses: dict[str, set[str]] = {}
    for rows in sides.values():
        for row in rows:
            licenses.setdefault(row.license, set()).add(row.source)
    known = {to_spdx(name) for name in allowed}
    for license, sources in sorted(licenses.items()):
        named = ", ".join(sorted(sources))
        if to_spdx(license) is None:
            problems.append(f"the licence {license!r} of {named} is no SPDX expression")
        elif allowed and to_spdx(license) not in known:
            problems.append(f"the licence {license!r} of {named} is not in validate.allowed_licenses")
    return problems


def check_adapter(config: Mapping[str, Any], lock: Lock) -> list[str]:
    """Return where the adapter is not the one that `fetch_base` and `finetune` make."""
    problems = []
    base, wanted = config.get("base_model_name_or_path"), artifacts("fetch_base").as_posix()
    if base != wanted:
        problems.append(f"the adapter was trained on {base}, not on {wanted} (adapter_config.json)")
    finetune = lock.params.get("finetune", {})
    for ours, theirs in (("rank", "r"), ("alpha", "lora_alpha")):
        if ours in finetune and config.get(theirs) != finetune[ours]:
            problems.append(
                f"the adapter has {theirs} {config.get(theirs)}, and finetune.{ours} was {finetune[ours]}"
            )
    return problems


def check_lock(lock: Lock, paths: Sequence[Path]) -> list[str]:
    """Return the stages that DVC has not run, and files that are not those it recorded."""
    absent = [stage for stage in BEFORE if stage not in lock.params]
    if len(absent) == len(BEFORE):
        return ["dvc.lock is not there, or empty: the files here were not made by DVC (dvc repro model_card)"]
    problems = [f"dvc.lock has no entry for {stage} (dvc repro {stage})" for stage in absent]
    return problems + disagreements(lock, paths)


def hub_license(license: str) -> tuple[str, str | None]:
    """Return the hub's `license` and `license_name`: it knows single SPDX ids, in small letters."""
    if license.startswith("LicenseRef-") or " " in license:
        return "other", license.removeprefix("LicenseRef-").lower().replace(" ", "-")
    return license.lower(), None


def read_revision() -> Revision:
    """Return the git commit of the code, and which of its files differ from it."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return Revision(None)
    status = _git("status", "--porcelain", "--untracked-files=all", "--", *CODE) or ""
    return Revision(commit.strip(), tuple(sorted(line[3:].strip('"') for line in status.splitlines())))


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def sources_table(sides: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """Return the rows of each source, licence and origin on each side of the split."""
    counts = {
        side: Counter((row.source, row.license, row.origin) for row in rows) for side, rows in sides.items()
    }
    return [
        {"source": source, "license": license, "origin": origin}
        | {side: counts[side][source, license, origin] for side in sides}
        for source, license, origin in sorted(set().union(*counts.values()))
    ]


def results_table(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return one line a metric: base, tuned and difference with intervals, p-value."""
    order = list(METRIC_MEANINGS)
    known = {name: name if name in METRIC_MEANINGS else "" for name in report["tuned"]}
    return [
        {
            "name": name,
            "meaning": METRIC_MEANINGS[known[name]],
            "base": _with_interval(report["base"][name]),
            "tuned": _with_interval(report["tuned"][name]),
            "difference": _with_interval(report["difference"][name], sign="+"),
            "p_value": f"{report['difference'][name]['p_value']:.4f}",
        }
        for name in sorted(report["tuned"], key=lambda name: order.index(known[name]))
    ]


def _with_interval(found: Mapping[str, float], sign: str = "") -> str:
    return f"{found['value']:{sign}.3f} ({found['low']:{sign}.3f} to {found['high']:{sign}.3f})"


def limits(evidence: Evidence) -> list[str]:
    """Return what the evidence says against the model, one sentence each."""
    collect, curate, split = evidence["collect"], evidence["curate"], evidence["split"]
    finetune, report = evidence["finetune"], evidence["evaluate"]
    found = []
    machine_made = {o: n for o, n in collect["by_origin"].items() if o in ("template", "synthetic") and n}
    if machine_made:
        share = sum(machine_made.values()) / collect["rows"]
        found.append(
            f"{share:.0%} of the rows that were collected are machine-made ({_counts(machine_made)}): "
            "people ask in other words, and nothing here measures how much that costs."
        )
    found.append(
        f"The test asks for {_many(report['groups'], 'group')} that training never saw, but of the same "
        "sources: of other sources nothing is known."
    )
    wrong = report["errors"]["rows"]
    faults = ", ".join(
        f"{kind} {n}" for kind, n in sorted(report["errors"]["by_kind"].items(), key=lambda k: -k[1])
    )
    found.append(
        f"{wrong} of {report['rows']} answers are not an exact match" + (f": {faults}." if faults else ".")
    )
    if report["errors"]["right_in_base_only"]:
        found.append(f"{report['errors']['right_in_base_only']} of these the base model had right.")
    for tag, by_value in report["slices"].items():
        # By the upper end: a slice of two rows, both wrong, is no proof of weakness.
        weakest = sorted(by_value.items(), key=lambda item: (item[1]["high"], item[1]["value"], item[0]))
        if len(weakest) > 1:
            each = "; ".join(
                f"{code(value)} {_with_interval(part)} on {_many(part['n'], 'row')} "
                f"in {_many(part['groups'], 'group')}"
                for value, part in weakest[:WEAKEST_SHOWN]
            )
            found.append(f"Weakest by {tag} ({report['primary']}, the surest first): {each}.")
    if report["confusions"]:
        each = "; ".join(
            f"{code(c['expected'])} answered as {code(c['answered'])} ({c['n']})"
            for c in report["confusions"][:WEAKEST_SHOWN]
        )
        found.append(f"Labels most often mistaken: {each}.")
    if untested := split.get("labels_without_test_rows"):
        found.append(f"Never tested, for want of groups: {', '.join(map(code, untested))}.")
    if collect["rejected"]:
        reasons = _counts(collect["rejected_by_reason"])
        found.append(f"Never collected: {_many(collect['rejected'], 'row')} ({reasons}).")
    if curate["dropped"]:
        found.append(
            f"Never kept: {_many(curate['dropped'], 'row')} ({_counts(curate['dropped_by_reason'])})."
        )
    if finetune["dropped_long_rows"]:
        found.append(f"Never learned, being too long: {_many(finetune['dropped_long_rows'], 'row')}.")
    if report["references_over_limit"]:
        found.append(
            f"{report['references_over_limit']} references are longer than the "
            f"{report['answer_limit_tokens']} tokens at which answers were cut: they could not be met."
        )
    if report["rows"] < report["test_rows"]:
        found.append(f"Only {report['rows']} of {report['test_rows']} test rows were asked.")
    return found


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + "s" * (count != 1)


def _counts(by_reason: Mapping[str, int]) -> str:
    return ", ".join(
        f"{reason} {n}" for reason, n in sorted(by_reason.items(), key=lambda item: (-item[1], item[0]))
    )


def front_matter(
    name: str,
    license: str,
    language: Sequence[str],
    evidence: Evidence,
    rows: Sequence[Row],
    test_hash: str | None,
) -> Any:
    """Return the card's metadata, with the results as the hub's model index."""
    from huggingface_hub import EvalResult, ModelCardData

    report = evidence["evaluate"]
    hub_id, hub_name = hub_license(license)
    sources = sorted({row.source.replace("/", "-") for row in rows})
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=sources[0] if len(sources) == 1 else name,
            dataset_name=", ".join(sources),
            dataset_split="test",
            dataset_revision=test_hash,
            metric_type=HUB_METRICS.get(metric, "accuracy" if metric.endswith("_accuracy") else metric),
            metric_value=found["value"],
            metric_name=metric,
        )
        for metric, found in report["tuned"].items()
        if metric not in NOT_FOR_THE_HUB
    ]
    return ModelCardData(
        model_name=name,
        base_model=evidence["fetch_base"]["name"],
        datasets=sources,
        language=list(language),
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "perennial", report["task"]],
        metrics=sorted({result.metric_type for result in results}),
        eval_results=results,
        license=hub_id,
        license_name=hub_name,
    )


def lineage(lock: Lock) -> list[tuple[str, str]]:
    """Return what DVC recorded of data, base, adapter and figures, and a hash of the parameters."""
    import hashlib

    paths = (
        ("collected rows", artifacts("collect")),
        ("curated rows", artifacts("curate")),
        ("split", artifacts("split")),
        ("base model", artifacts("fetch_base")),
        ("adapter", artifacts("finetune")),
        ("answers to the test", artifacts("evaluate")),
    )
    recorded = [(f"{what} (`{path}`)", found) for what, path in paths if (found := lock.hash_of(path))]
    params = hashlib.sha256(canonical_json({s: lock.params[s] for s in BEFORE}).encode()).hexdigest()
    return [*recorded, ("parameters (sha256 of the sections below as canonical JSON)", params)]


def render(context: Mapping[str, Any]) -> str:
    """Fill the template; a value that it lacks is an error."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["code"] = code
    environment.filters["count"] = lambda n: f"{n:,}"
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(context)


def pictures(evidence: Evidence) -> dict[str, Path]:
    """Return the pictures to put beside the card, by their names there."""
    found = {
        "comparison.svg": reports("evaluate") / "pictures" / "comparison.svg",
        "slices.svg": reports("evaluate") / "pictures" / "slices.svg",
        "loss.svg": reports("finetune") / "loss.svg",
        "groups.svg": reports("check_bias") / "groups.svg",
    }
    if evidence.get("evaluate", {}).get("label_key"):
        found["confusion.svg"] = reports("evaluate") / "pictures" / "confusion.svg"
    return found


def read_sides() -> tuple[dict[str, list[Row]], list[str]]:
    """Return the rows of each side of the split, and what keeps them from being read."""
    sides: dict[str, list[Row]] = {}
    problems = []
    for side in SIDES:
        try:
            sides[side] = read_rows(artifacts("split") / f"{side}.parquet")
        except InputError as error:
            problems.append(error.what)
    return sides, problems


def read_adapter_config() -> tuple[dict[str, Any] | None, list[str]]:
    """Return the adapter's own description, and what keeps it from being read."""
    path = artifacts("finetune") / "adapter_config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")), []
    except FileNotFoundError:
        return None, [f"{path} is not there (dvc repro finetune)"]
    except ValueError as error:
        return None, [f"{path} is not JSON: {error}"]


def main() -> None:
    """Check all evidence against itself, then write the card."""
    params = load_params().model_card
    lock = read_lock(BEFORE)
    evidence, problems = read_evidence()
    sides, unreadable_rows = read_sides()
    adapter, unreadable_adapter = read_adapter_config()
    beside = pictures(evidence)
    on_record = [
        *(reports(stage) / "metrics.json" for stage in BEFORE),
        *(artifacts(stage) for stage in ("fetch_base", "split", "finetune")),
        *(artifacts("split") / f"{side}.parquet" for side in SIDES),
        *beside.values(),
    ]
    problems += unreadable_rows + unreadable_adapter + check_figures(evidence)
    problems += [
        f"{path} is not there (dvc repro {path.parts[1]})" for path in beside.values() if not path.is_file()
    ]
    problems += check_rows(sides, evidence, lock.params.get("validate", {}).get("allowed_licenses", ()))
    problems += check_adapter(adapter, lock) if adapter else []
    problems += check_lock(lock, on_record)
    problems += [
        f"the licence {license!r} of {what} is no SPDX expression"
        for what, license in (
            ("the model (model_card.license)", params.license),
            ("the base model", figure(evidence, "fetch_base.license")),
        )
        if license is not None and to_spdx(license) is None
    ]
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise InputError(
            f"{count} with the evidence for the model card\n"
            + "\n".join(f"- {problem}" for problem in problems),
            "dvc repro model_card makes what is missing or out of date; a licence is mended in params.yaml",
        )

    rows = [row for side in SIDES for row in sides[side]]
    metadata = front_matter(
        params.name,
        to_spdx(params.license) or params.license,
        params.language,
        evidence,
        rows,
        lock.hash_of(artifacts("split") / "test.parquet"),
    )
    example = sides["test"][0]
    body = render(
        {
            **evidence,
            "name": params.name,
            "license": to_spdx(params.license),
            "language": params.language,
            "intended_use": params.intended_use.strip(),
            "out_of_scope": params.out_of_scope.strip(),
            "sources": sources_table(sides),
            "sides": {side: len(sides[side]) for side in SIDES},
            "results": results_table(evidence["evaluate"]),
            "limits": limits(evidence),
            "recipe": lock.params["finetune"],
            "all_params": json.dumps({s: lock.params[s] for s in BEFORE}, indent=2, ensure_ascii=False),
            "lineage": lineage(lock),
            "revision": read_revision(),
            "target_modules": adapter["target_modules"] if adapter else [],
            "example_messages": json.dumps(
                [{"role": m.role, "content": m.content} for m in example.prompt], indent=4, ensure_ascii=False
            ),
            "example_answer": example.answer,
            "pictures": sorted(beside),
        }
    )
    with atomic_dir(reports("model_card")) as folder:
        for name, path in beside.items():
            shutil.copyfile(path, folder / name)
        write_text(folder / "README.md", f"---\n{metadata.to_yaml()}\n---\n\n{body}")
    log.info("%s: %d figures agree", reports("model_card") / "README.md", len(NEEDED))


if __name__ == "__main__":
    run_stage(main)
