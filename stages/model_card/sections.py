"""Build the sections of the card: metadata, tables, limits, lineage."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.common.artifacts import artifacts
from stages.common.escaping import clean_line, escape_markdown, format_code
from stages.common.model.adapter import HEAD, PEFT_METHODS
from stages.common.params.types import LANGUAGE_CODE
from stages.common.records import Row, format_canonical_json
from stages.common.repository.dvc_lock import Lock
from stages.model_card.evidence import SECTIONS, Evidence

TEMPLATE = Path(__file__).with_name("card.md.j2")

LORA_NAMES = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA"}
OBJECTIVE_NAMES = {
    "dpo": "Direct Preference Optimization (DPO), on pairs of a better and a worse answer",
    "orpo": "Odds Ratio Preference Optimization (ORPO), on pairs of a better and a worse answer",
    "distill": "distillation of a teacher",
    "grpo": "Group Relative Policy Optimization (GRPO), from rewards by the checks of its own answers",
    "kto": "Kahneman-Tversky Optimization (KTO), on answers that people rated",
}
# The figures of a training that rewards the model's own answers (grpo).
SAMPLED_NAMES = {
    "reward": "mean reward",
    "valid": "share of valid ones",
    "schema": "share that fits the schema",
    "match": "share that means the same as the reference",
    "answer_tokens": "mean length of an answer in tokens",
    "compared": "share of prompts whose answers differ in worth",
}
PROMPT_NAMES = {"prompt_tuning": "prompt tuning", "prefix_tuning": "prefix tuning"}

# The names under which the Hugging Face hub knows our metrics.
HUB_METRICS = {"slot_f1": "f1", "macro_f1": "f1", "weighted_f1": "f1", "rouge_l": "rouge"}

NOT_FOR_THE_HUB = ("finished", "answer_tokens", "length_ratio")

WEAKEST_SHOWN = 5


def name_objective(finetune: Mapping[str, Any]) -> str | None:
    """Return what was learned, from the metrics of `finetune`; None for the rows' answers alone."""
    if federated := finetune.get("federated"):
        return f"federated averaging of {federated['clients']} clients over {federated['rounds']} rounds"
    return OBJECTIVE_NAMES.get("distill" if "teacher" in finetune else finetune["method"])


def build_metadata(
    name: str,
    license: str,
    language: Sequence[str],
    evidence: Evidence,
    rows: Iterable[Row],
    test_hash: str | None,
) -> Any:
    """Return the card's metadata, with the results as the hub's model index."""
    from huggingface_hub import EvalResult, ModelCardData

    report = evidence["evaluate"]
    hub_id, hub_name = to_hub_license(license)
    method = evidence["finetune"]["method"]
    kind = "text-classification" if method == HEAD else "text-generation"
    sources = sorted({row.source.replace("/", "-") for row in rows})
    results = [
        EvalResult(
            task_type=kind,
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
        language=list(language) or None,
        library_name="peft" if method in PEFT_METHODS else "transformers",
        pipeline_tag=kind,
        tags=[method, "perennial", report["task"]],
        metrics=sorted({result.metric_type for result in results}),
        eval_results=results,
        license=hub_id,
        license_name=hub_name,
    )


def to_hub_license(license: str) -> tuple[str, str | None]:
    """Return the hub's `license` and `license_name`: it knows single SPDX ids, in small letters."""
    if license.startswith("LicenseRef-") or " " in license:
        return "other", license.removeprefix("LicenseRef-").lower().replace(" ", "-")
    return license.lower(), None


def list_languages(rows: Sequence[Row]) -> list[str]:
    """Return the languages that the rows' tag `language` names by an ISO 639 code; none where it does not."""
    return sorted({tag for row in rows if re.fullmatch(LANGUAGE_CODE, tag := row.tags.get("language", ""))})


def count_sources(sides: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """Return, for each source, licence and origin, its number of rows on each side of the split."""
    counts = {
        side: Counter((row.source, row.license, row.origin) for row in rows) for side, rows in sides.items()
    }
    return [
        {"source": source, "license": license, "origin": origin}
        | {side: counts[side][source, license, origin] for side in sides}
        for source, license, origin in sorted(set().union(*counts.values()))
    ]


def list_results(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return one line per metric: base, tuned and difference with their intervals, and the p-value."""
    return [
        {
            "name": name,
            "meaning": meaning,
            "base": _with_interval(report["base"][name]),
            "tuned": _with_interval(report["tuned"][name]),
            "difference": _with_interval(report["difference"][name], sign="+"),
            "p_value": f"{report['difference'][name]['p_value']:.4f}",
        }
        for name, meaning in ((metric["name"], metric["meaning"]) for metric in report["metrics"])
    ]


def list_smaller_models(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return one line for each model that `compress` compared: size and quality, without speeds."""
    return [
        {
            "name": name,
            "size": f"{one['bytes'] / 2**20:.1f}",
            "quality": _with_interval(one["results"][report["primary"]]),
            "lost": f"{one['lost_points']:.2f}",
        }
        for name, one in report["models"].items()
    ]


def _with_interval(found: Mapping[str, float], sign: str = "") -> str:
    return f"{found['value']:{sign}.3f} ({found['low']:{sign}.3f} to {found['high']:{sign}.3f})"


def describe_adapter(adapter: Mapping[str, Any]) -> dict[str, str]:
    """Return what an adapter is, and what was trained, as beginnings of sentences."""
    method, modules = adapter["method"], adapter.get("trained_modules")
    if name := LORA_NAMES.get(method):
        targets = adapter["target_modules"]
        listed = targets if isinstance(targets, str) else ", ".join(targets)
        return {"kind": f"A {name} adapter", "trained": f"{name} of rank {adapter['rank']} on {listed}"}
    if name := PROMPT_NAMES.get(method):
        learned = f"{adapter['num_virtual_tokens']} virtual tokens before every text"
        return {"kind": f"An adapter by {name}", "trained": f"{name.capitalize()}: {learned}"}
    if method == HEAD:
        what = f"A linear layer over {len(adapter['labels'])} labels"
        return {"kind": "A linear head", "trained": f"{what} was trained on the prompt's last hidden state"}
    if method == "full":
        return {"kind": "A full fine-tune", "trained": "All weights were trained"}
    which = f"the last {modules} transformer blocks" if isinstance(modules, int) else ", ".join(modules or ())
    return {"kind": "A partial fine-tune", "trained": f"The weights of {which} were trained"}


def describe_measured(held_out: Mapping[str, Any] | None) -> str:
    """Return on how many pairs or rated answers the preference was measured."""
    if not held_out:
        return ""
    if "pairs" in held_out:
        return _many(held_out["pairs"], "pair")
    return f"{held_out['good']:,} good and {held_out['bad']:,} bad answers"


def describe_sampled(figures: Mapping[str, Mapping[str, float]] | None) -> str:
    """Return what the answers that a training sampled were worth, at its beginning and its end."""
    if not figures:
        return ""
    found = ((told, figures[name]) for name, told in SAMPLED_NAMES.items() if name in figures)
    parts = [f"{told} {one['first']:.3f} and {one['last']:.3f}" for told, one in found]
    return "; ".join(parts)


def describe_preferences(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what the card states of the preference on test pairs; None where it was not measured."""
    found = report.get("preferences")
    if not found or "skipped" in found:
        return None
    start, change = found["started_from"], found["difference"]["accuracy"]
    return {
        "pairs": found["pairs"],
        "tuned": _with_interval(found["tuned"]["accuracy"]),
        "before": _with_interval(found["before"]["accuracy"]),
        "started_from": "the base model" if start == "base" else f"version {format_code(start)}",
        "difference": _with_interval(change, sign="+"),
        "p_value": f"{change['p_value']:.4f}",
        "margin": _with_interval(found["tuned"]["margin"]),
        "margin_before": _with_interval(found["before"]["margin"]),
    }


def describe_start(recipe: Mapping[str, Any]) -> str:
    """Return from what a new adapter of a recipe (the section `finetune`) is initialized."""
    chosen = "zero" if recipe["method"] == HEAD else recipe.get(f"{recipe['method']}_init", "random")
    return {
        "random": "at random",
        "zero": "with zeros",
        "sample_vocab": "with words drawn at random",
        "text": f"with the words {format_code(recipe.get('prompt_tuning_init_text') or '')}",
    }[chosen]


def describe_limits(evidence: Evidence) -> list[str]:
    """Return the known limits of the model and of its test, one sentence each."""
    report = evidence["evaluate"]
    return [
        *_origin_limits(evidence["collect"]),
        f"The test has {_many(report['groups'], 'group')} that are not in the training data, but from the "
        "same sources: how well the model generalizes to other sources is not known.",
        report["resolution"]["statement"],
        *_error_limits(report),
        *_label_limits(report, evidence["split"]),
        *_rejected_limits(evidence["collect"], evidence["curate"], evidence["finetune"]),
        *_test_limits(report),
    ]


def _origin_limits(collect: Mapping[str, Any]) -> Iterator[str]:
    generated = {o: n for o, n in collect["by_origin"].items() if o in ("template", "synthetic") and n}
    if generated:
        share = sum(generated.values()) / collect["rows"]
        yield (
            f"{share:.0%} of the collected rows are machine-generated ({_counts(generated)}): people write "
            "differently, and the test does not measure what that costs."
        )


def _error_limits(report: Mapping[str, Any]) -> Iterator[str]:
    errors = report["errors"]
    types = ", ".join(f"{name} {n}" for name, n in sorted(errors["by_type"].items(), key=lambda k: -k[1]))
    yield f"{errors['rows']} of {report['rows']} answers are not an exact match" + (
        f": {types}." if types else "."
    )
    if errors["right_in_base_only"]:
        yield f"The base model answered {errors['right_in_base_only']} of these correctly."
    for tag, by_value in report["slices"].items():
        # By the upper end: a slice of two rows, both wrong, does not prove a weakness.
        weakest = sorted(by_value.items(), key=lambda item: (item[1]["high"], item[1]["value"], item[0]))
        if len(weakest) > 1:
            each = "; ".join(
                f"{format_code(value)} {_with_interval(part)} on {_many(part['n'], 'row')} "
                f"in {_many(part['groups'], 'group')}"
                for value, part in weakest[:WEAKEST_SHOWN]
            )
            yield f"Weakest by {tag} ({report['primary']}, by the upper end of the interval): {each}."


def _label_limits(report: Mapping[str, Any], split: Mapping[str, Any]) -> Iterator[str]:
    if report["confusions"]:
        each = "; ".join(
            f"{format_code(c['expected'])} answered as {format_code(c['answered'])} ({c['n']})"
            for c in report["confusions"][:WEAKEST_SHOWN]
        )
        yield f"Classes most often confused: {each}."
    if untested := split.get("labels_without_test_rows"):
        yield f"Not tested, because too few groups have them: {', '.join(map(format_code, untested))}."


def _rejected_limits(
    collect: Mapping[str, Any], curate: Mapping[str, Any], finetune: Mapping[str, Any]
) -> Iterator[str]:
    if collect["rejected"]:
        reasons = _counts(collect["rejected_by_reason"])
        yield f"Rejected by collect: {_many(collect['rejected'], 'row')} ({reasons})."
    if curate["rejected"]:
        reasons = _counts(curate["rejected_by_reason"])
        yield f"Rejected by curate: {_many(curate['rejected'], 'row')} ({reasons})."
    if finetune["rejected_long_rows"]:
        yield f"Too long to train on: {_many(finetune['rejected_long_rows'], 'row')}."
    if finetune["rejected_refused_rows"]:
        yield f"Refused by the base model's chat template: {_many(finetune['rejected_refused_rows'], 'row')}."


def _test_limits(report: Mapping[str, Any]) -> Iterator[str]:
    if report["references_over_limit"]:
        yield (
            f"{report['references_over_limit']} references are longer than the "
            f"{report['answer_limit_tokens']} tokens at which answers are cut, so no answer could match them."
        )
    if report["rows"] < report["test_rows"]:
        yield f"Only {report['rows']} of {report['test_rows']} test rows were evaluated."


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + "s" * (count != 1)


def _counts(by_reason: Mapping[str, int]) -> str:
    return ", ".join(
        f"{reason} {n}" for reason, n in sorted(by_reason.items(), key=lambda item: (-item[1], item[0]))
    )


def list_params(lock: Lock) -> dict[str, Any]:
    """Return the parameters for a reader elsewhere: the folder of a base model without its path here."""
    params = {section: lock.params[section] for section in SECTIONS}
    base = params["fetch_base"]
    if base["origin"] == "folder":
        params["fetch_base"] = {**base, "name": Path(base["name"]).name}
    return params


def list_lineage(lock: Lock) -> list[tuple[str, str]]:
    """Return the hashes that DVC recorded of data, base, adapter and answers, and one of the parameters."""
    paths = (
        ("collected rows", artifacts("collect")),
        ("curated rows", artifacts("curate")),
        ("split", artifacts("split")),
        ("base model", artifacts("fetch_base")),
        ("adapter", artifacts("finetune")),
        ("answers to the test", artifacts("evaluate")),
    )
    recorded = [(f"{what} (`{path}`)", found) for what, path in paths if (found := lock.hash_of(path))]
    params = hashlib.sha256(format_canonical_json(list_params(lock)).encode()).hexdigest()
    return [*recorded, ("parameters (sha256 of the sections below as canonical JSON)", params)]


def render_card(context: Mapping[str, Any]) -> str:
    """Fill the template.

    Raises:
        UndefinedError: the template uses a value that is not in `context`.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {"code": format_code, "text": escape_markdown, "line": clean_line}
    environment.filters["count"] = lambda n: f"{n:,}"
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(context)
