"""Evaluate: ask the tuned model the questions that the base model was asked, and compare their answers.

In: `artifacts/split/test.parquet`, `artifacts/ask_base`, `artifacts/fetch_base`, `artifacts/finetune`,
`artifacts/export`.
Out: `reports/evaluate/metrics.json` with each metric as value, low, high and n for both models, their
difference with a p-value, slices by tag, and the throughput (the only key that changes between identical
runs); `errors.md` and `errors.csv`, worst first; `pictures/`;
`artifacts/evaluate/predictions.parquet`.

Run it with `dvc repro evaluate` or `python -m stages.evaluate`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from services.engines.offline import (
    ModelAnswers,
    ModelFolders,
    ask_model,
    pick_engine,
    throughput,
)
from stages.common.artifacts import (
    artifacts,
    atomic_dir,
    atomic_write,
    read_json,
    reports,
    write_json,
    write_text,
)
from stages.common.errors import InputError
from stages.common.generation import Answer, Question, encode_questions, read_answers
from stages.common.logs import get_logger, progress, run_stage
from stages.common.metrics import (
    JsonAnswer,
    Metric,
    mean,
    perplexity,
    read_json_answer,
    score_json,
    score_text,
    share,
)
from stages.common.models import load_tokenizer
from stages.common.params.loading import AskBase, load_params
from stages.common.records import Row, read_rows
from stages.common.statistics import difference, interval, sums_by_group
from stages.evaluate.error_analysis import Given, confusions, errors_csv, errors_md, mistakes
from stages.evaluate.plots import Bar, draw_comparison, draw_confusion, draw_slices

log = get_logger("evaluate")

# The metric by which slices are shown and answers called right.
PRIMARY = {"json": "exact_match", "text": "rouge_l"}

Metrics = dict[str, Metric]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How intervals and tests are computed."""

    confidence: float
    resamples: int
    seed: int


def read_references(rows: Sequence[Row], label_key: str | None) -> list[JsonAnswer]:
    """Return the references as JSON.

    Raises:
        InputError: some are not JSON, or have no label; all of them are counted, the first ones shown.
    """
    read = [(row, read_json_answer(row.answer)) for row in rows]
    broken = [row for row, answer in read if answer is None]
    if broken:
        raise InputError(
            f"{len(broken)} of {len(rows)} test answers are not one JSON value{_examples(broken)}",
            "set evaluate.task: text, or set curate.answer_format: json so that such rows are dropped",
        )
    references = [answer for _, answer in read if answer is not None]
    if label_key is not None:
        unlabelled = [r for r, a in zip(rows, references, strict=True) if a.label(label_key) is None]
        if unlabelled:
            raise InputError(
                f"{len(unlabelled)} of {len(rows)} test answers have no text under evaluate.label_key "
                f"({label_key!r}){_examples(unlabelled)}",
                "set evaluate.label_key to the key that names an answer's class, or to null if there is none",
            )
    return references


def score(
    rows: Sequence[Row],
    questions: Sequence[Question],
    answers: Sequence[Answer],
    task: str,
    label_key: str | None,
) -> Metrics:
    """Return every metric of one model's answers."""
    if task == "json":
        read = [read_json_answer(answer.text) for answer in answers]
        metrics = score_json(read, read_references(rows, label_key), label_key)
    else:
        metrics = score_text([answer.text for answer in answers], [row.answer for row in rows])
    return {
        **metrics,
        "finished": share([answer.complete for answer in answers]),
        "perplexity": perplexity([a.reference_loss for a in answers], [len(q.reference) for q in questions]),
        "answer_tokens": mean([float(answer.tokens) for answer in answers], scale=None),
    }


def check_finite(metrics: Metrics, model: str) -> None:
    """Raise InputError if a model's perplexity is beyond any number: its weights are broken."""
    value = float(metrics["perplexity"].figure(metrics["perplexity"].columns.sum(axis=0)))
    if not math.isfinite(value):
        raise InputError(
            f"the {model} model's perplexity of the test answers is {value}",
            "the training has diverged: lower finetune.learning_rate and train again"
            if model == "tuned"
            else "the base model's weights are broken: remove artifacts/fetch_base and fetch it again",
        )


def with_intervals(
    metrics: Metrics, groups: Sequence[str], sampling: Sampling
) -> dict[str, dict[str, float]]:
    """Return each metric as value, low, high and n."""
    return {
        name: {
            **_rounded(
                asdict(
                    interval(
                        sums_by_group(metric.columns, groups),
                        metric.figure,
                        sampling.confidence,
                        sampling.resamples,
                        sampling.seed,
                        metric.scale,
                    )
                )
            ),
            "n": len(groups),
        }
        for name, metric in metrics.items()
    }


def differences(
    base: Metrics, tuned: Metrics, groups: Sequence[str], sampling: Sampling
) -> dict[str, dict[str, float]]:
    """Return tuned minus base for each metric, with interval, p-value and n."""
    return {
        name: {
            **_rounded(
                asdict(
                    difference(
                        sums_by_group(base[name].columns, groups),
                        sums_by_group(metric.columns, groups),
                        metric.figure,
                        sampling.confidence,
                        sampling.resamples,
                        sampling.seed,
                        metric.scale,
                    )
                )
            ),
            "n": len(groups),
        }
        for name, metric in tuned.items()
    }


def slice_figures(
    rows: Sequence[Row], metric: Metric, tags: Sequence[str], sampling: Sampling
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the metric for the rows of each value of each tag; a tag that no row has gives nothing."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for tag in tags:
        found[tag] = {}
        for value in sorted({row.tags[tag] for row in rows if tag in row.tags}):
            places = [i for i, row in enumerate(rows) if row.tags.get(tag) == value]
            groups = [rows[i].group for i in places]
            part = Metric(metric.columns[places], metric.figure, metric.scale)
            figures = with_intervals({"it": part}, groups, sampling)["it"]
            found[tag][value] = {**figures, "groups": len(set(groups))}
    return found


def write_predictions(
    path: Path,
    rows: Sequence[Row],
    questions: Sequence[Question],
    answers: Mapping[str, Sequence[Answer]],
    given: Mapping[str, Sequence[Given]],
) -> None:
    """Write every answer of both models as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {
        "id": [row.id for row in rows],
        "group": [row.group for row in rows],
        "question": [row.question for row in rows],
        "reference": [row.answer for row in rows],
        "reference_tokens": [len(q.reference) for q in questions],
    }
    for model, found in answers.items():
        columns[model] = [answer.text for answer in found]
        columns[f"{model}_exact_match"] = [g.right for g in given[model]]
        columns[f"{model}_finished"] = [answer.complete for answer in found]
        columns[f"{model}_tokens"] = [answer.tokens for answer in found]
        columns[f"{model}_reference_loss"] = [answer.reference_loss for answer in found]
    with atomic_write(path) as beside:
        pq.write_table(pa.table(columns), beside, compression="zstd")


def draw(folder: Path, report: Mapping[str, Any], confused: Sequence[tuple[str, str, int]]) -> None:
    """Draw base against tuned, the slices and, where there are labels, the confusions."""
    # Scores on the scale of 0 to 100 are drawn with the others.
    scales = {"chrf": 100.0, "bleu": 100.0, "perplexity": None, "answer_tokens": None}
    names = [name for name in report["tuned"] if scales.get(name, 1.0)]
    bars = {
        model: [
            _bar(
                name.replace("_", " ").replace("f1", "F1"), report[model][name], scales.get(name, 1.0) or 1.0
            )
            for name in names
        ]
        for model in ("base", "tuned")
    }
    rows, percent = report["rows"], round(100 * report["confidence"])
    draw_comparison(
        folder / "comparison.svg",
        bars["base"],
        bars["tuned"],
        f"Base and tuned model on {rows} test rows, with {percent} % intervals",
    )
    slices = {t: [_bar(v, f, 1.0) for v, f in by_value.items()] for t, by_value in report["slices"].items()}
    primary = report["primary"].replace("_", " ")
    draw_slices(folder / "slices.svg", slices, f"{primary} of the tuned model, with {percent} % intervals")
    if report["label_key"]:
        draw_confusion(folder / "confusion.svg", confused, "Wrong labels of the tuned model, in test rows")


def _bar(name: str, figures: Mapping[str, float], scale: float) -> Bar:
    value, low, high = (figures[key] / scale for key in ("value", "low", "high"))
    return Bar(name, value, low, high, int(figures["n"]), int(figures.get("groups", 0)))


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    """Six digits: more than the interval warrants, fewer than rounding of sums can disturb."""
    return {name: round(value, 6) for name, value in figures.items()}


def _examples(rows: Sequence[Row]) -> str:
    return "".join(f"\n  row {row.id}: {row.answer[:100]!r}" for row in rows[:3])


def read_test(all_rows: Sequence[Row], base: Mapping[str, Answer]) -> list[Row]:
    """Return the test rows that the base model was asked, in the order of its answers.

    Raises:
        InputError: a row is not in the test split.
    """
    by_id = {row.id: row for row in all_rows}
    if unknown := [row_id for row_id in base if row_id not in by_id]:
        raise InputError(
            f"the base model was asked {len(unknown)} rows that are not in the test split: {unknown[:3]}",
            "ask it again: dvc repro ask_base",
        )
    return [by_id[row_id] for row_id in base]


def ask_tuned(
    questions: Sequence[Question], tokenizer: Any, settings: AskBase, limit: int, exports_gguf: bool
) -> ModelAnswers:
    """Ask the tuned model, with the engine that asked the base model."""
    base = artifacts("fetch_base")
    engine = pick_engine(settings.engine, base, exports_gguf)
    gguf = artifacts("export") / "model.gguf"
    log.info("asking the tuned model %d questions", len(questions))
    return ask_model(
        ModelFolders(base, artifacts("finetune"), gguf if engine == "paged" else None),
        engine,
        tokenizer,
        questions,
        settings.batch_size,
        limit,
        lambda done: progress(log, done, len(questions), "tuned"),
    )


def figures(
    rows: Sequence[Row], metrics: Mapping[str, Metrics], primary: str, tags: Sequence[str], sampling: Sampling
) -> dict[str, Any]:
    """Return what is known of both models, of their difference, and of the tuned one by slice."""
    groups = [row.group for row in rows]
    return {
        "rows": len(rows),
        "groups": len(set(groups)),
        "primary": primary,
        "confidence": sampling.confidence,
        "resamples": sampling.resamples,
        **{name: with_intervals(metrics[name], groups, sampling) for name in metrics},
        "difference": differences(metrics["base"], metrics["tuned"], groups, sampling),
        "slices": slice_figures(rows, metrics["tuned"][primary], tags, sampling),
    }


def _given(answers: Sequence[Answer], exact_match: Metric) -> list[Given]:
    return [
        Given(answer.text, bool(hit), answer.reference_loss)
        for answer, hit in zip(answers, exact_match.by_row(), strict=True)
    ]


def main() -> None:
    """Ask the tuned model, compare both models' answers, and write the results."""
    whole = load_params()
    params = whole.evaluate
    base_answers = read_answers(artifacts("ask_base") / "answers.parquet")
    base_report = read_json(reports("ask_base") / "metrics.json")
    rows = read_test(read_rows(artifacts("split") / "test.parquet"), base_answers)
    if params.task == "json":
        read_references(rows, params.label_key)
    tokenizer = load_tokenizer(artifacts("fetch_base"))
    questions = encode_questions(tokenizer, rows)
    limit = base_report["answer_limit_tokens"]
    tuned = ask_tuned(questions, tokenizer, whole.ask_base, limit, whole.export.gguf)
    answers = {"base": list(base_answers.values()), "tuned": tuned.answers}
    metrics = {name: score(rows, questions, answers[name], params.task, params.label_key) for name in answers}
    for name in metrics:
        check_finite(metrics[name], name)
    given = {name: _given(answers[name], metrics[name]["exact_match"]) for name in answers}
    found = mistakes(rows, given["base"], given["tuned"], params.task, params.label_key)
    confused = (
        confusions(rows, [g.text for g in given["tuned"]], params.label_key) if params.label_key else []
    )
    primary = PRIMARY[params.task]
    report: dict[str, Any] = {
        "task": params.task,
        "label_key": params.label_key,
        "engine": {"base": base_report["engine"], "tuned": tuned.engine},
        "dtype": tuned.dtype,
        "test_rows": base_report["test_rows"],
        "answer_limit_tokens": limit,
        "references_over_limit": base_report["references_over_limit"],
        **figures(
            rows,
            metrics,
            primary,
            params.slices,
            Sampling(params.confidence, params.resamples, params.seed),
        ),
        "confusions": [{"expected": e, "answered": a, "n": n} for e, a, n in confused],
        "errors": {
            "rows": len(found),
            "by_kind": dict(sorted(Counter(mistake.kind for mistake in found).items())),
            "right_in_base_only": sum(mistake.base_was_right for mistake in found),
        },
        "throughput": {"tuned": throughput(tuned)},
    }

    write_predictions(artifacts("evaluate") / "predictions.parquet", rows, questions, answers, given)
    folder = reports("evaluate")
    write_text(folder / "errors.csv", errors_csv(found))
    write_text(folder / "errors.md", errors_md(found, len(rows), confused, params.errors_shown, params.task))
    with atomic_dir(folder / "pictures") as pictures:
        draw(pictures, report, confused)
    write_json(folder / "metrics.json", report)
    for name in answers:
        best = report[name][primary]
        log.info("%s: %s %.3f (%.3f to %.3f)", name, primary, best["value"], best["low"], best["high"])


if __name__ == "__main__":
    run_stage(main)
