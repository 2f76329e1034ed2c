"""Evaluate: ask the base and the tuned model the same test questions, and say how sure the figures are.

In: `artifacts/split/test.parquet`, `artifacts/fetch_base`, `artifacts/finetune`.
Out: `reports/evaluate/metrics.json` with each metric as value, low, high and n for both models, their
difference with a p-value, slices by tag, and the throughput (the only key that changes between identical
runs; the base's is of when it was asked); `errors.md` and `errors.csv`, worst first; `pictures/`;
`artifacts/evaluate/predictions.parquet`.

Run it with `dvc repro evaluate` or `python -m stages.evaluate`.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from stages.common.artifacts import artifacts, atomic_dir, atomic_write, reports, write_json, write_text
from stages.common.errors import InputError
from stages.common.generation import (
    Answer,
    Question,
    answer_questions,
    check_fit,
    encode_questions,
    single_latencies,
)
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
from stages.common.models import load_base, load_tokenizer, load_tuned, pick_device, pick_dtype
from stages.common.params.loading import load_params
from stages.common.records import Row, read_rows
from stages.common.statistics import difference, interval, sums_by_group
from stages.evaluate.base_answers import Judged, fingerprint, keep, recall
from stages.evaluate.error_analysis import Given, confusions, errors_csv, errors_md, mistakes
from stages.evaluate.plots import Bar, draw_comparison, draw_confusion, draw_slices

log = get_logger("evaluate")

# Asked one by one for the latency: enough for a median, and no more than a few seconds on a CPU.
LATENCY_ROWS = 10

# An answer a quarter longer than the longest reference rambles; waiting for its end costs only time.
ANSWER_ROOM = 1.25

# The metric by which slices are shown and answers called right.
PRIMARY = {"json": "exact_match", "text": "rouge_l"}

Metrics = dict[str, Metric]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How intervals and tests are computed."""

    confidence: float
    resamples: int
    seed: int


def choose_rows(rows: Sequence[Row], max_rows: int | None, min_rows: int, seed: int) -> list[Row]:
    """Return the rows to ask, in their order, at most `max_rows` of them.

    Raises:
        InputError: they are fewer than `min_rows`, or all of one group.
    """
    if len(rows) < min_rows:
        raise InputError(
            f"the test split has {len(rows)} rows, and evaluate.min_test_rows asks for {min_rows}",
            "collect more rows, raise split.test_fraction or split.max_test_rows_per_group, "
            "or lower evaluate.min_test_rows and accept wider intervals",
        )
    if max_rows is not None and len(rows) > max_rows:
        rows = [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), max_rows))]
    if len({row.group for row in rows}) < 2:
        raise InputError(
            f"all {len(rows)} test rows are of one group ({rows[0].group})",
            "an interval needs several: give rows their own groups (group_column of the source), "
            "or raise split.test_fraction",
        )
    return list(rows)


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


def answer_limit(questions: Sequence[Question], max_new_tokens: int) -> int:
    """Return after how many tokens an answer is cut: room for the longest reference, within the limit."""
    longest = max(len(q.reference) for q in questions)
    return min(max_new_tokens, math.ceil(longest * ANSWER_ROOM))


def judge(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    batch_size: int,
    max_new_tokens: int,
    on_progress: Callable[[int], None],
) -> Judged:
    """Ask one model all questions in batches, and a few one by one for the latency."""
    start = time.perf_counter()
    answers = answer_questions(model, tokenizer, questions, batch_size, max_new_tokens, on_progress)
    seconds = time.perf_counter() - start
    step = max(1, len(questions) // LATENCY_ROWS)
    alone = list(questions[::step])[:LATENCY_ROWS]
    return Judged(answers, seconds, single_latencies(model, tokenizer, alone, max_new_tokens))


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


def throughput(judged: Judged) -> dict[str, float]:
    """Return how fast a model answered: batched rows and tokens a second, and the latency of one request."""
    tokens = sum(answer.tokens for answer in judged.answers)
    return {
        "seconds": round(judged.seconds, 2),
        "rows_per_s": round(len(judged.answers) / judged.seconds, 2),
        "tokens_per_s": round(tokens / judged.seconds, 1),
        "latency_rows": len(judged.latencies),
        "latency_p50_s": round(float(np.quantile(judged.latencies, 0.5)), 3),
        "latency_p95_s": round(float(np.quantile(judged.latencies, 0.95)), 3),
    }


def write_predictions(
    path: Path,
    rows: Sequence[Row],
    questions: Sequence[Question],
    judged: Mapping[str, Judged],
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
    for model, judgement in judged.items():
        columns[model] = [answer.text for answer in judgement.answers]
        columns[f"{model}_exact_match"] = [g.right for g in given[model]]
        columns[f"{model}_finished"] = [answer.complete for answer in judgement.answers]
        columns[f"{model}_tokens"] = [answer.tokens for answer in judgement.answers]
        columns[f"{model}_reference_loss"] = [answer.reference_loss for answer in judgement.answers]
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


def ask_both(
    questions: Sequence[Question], tokenizer: Any, batch_size: int, max_new_tokens: int
) -> tuple[dict[str, Judged], str]:
    """Ask the base, then the tuned model, one in memory at a time; return also the type they compute in.

    A base that was asked the same before is not asked again (`stages.evaluate.base_answers`).
    """
    folder, adapter = artifacts("fetch_base"), artifacts("finetune")
    device = pick_device()
    dtype = pick_dtype(device)
    loaders = {
        "base": lambda: load_base(folder, dtype, device),
        "tuned": lambda: load_tuned(folder, adapter, dtype, device),
    }
    asked = fingerprint(
        folder, questions, batch=batch_size, limit=max_new_tokens, dtype=str(dtype), device=str(device)
    )
    judged: dict[str, Judged] = {}
    if (known := recall(asked)) is not None:
        log.info("the base model was asked these %d questions before: its answers are kept", len(questions))
        judged["base"] = known
    for name, load in loaders.items():
        if name in judged:
            continue
        model = load()
        check_fit(questions, max_new_tokens, getattr(model.config, "max_position_embeddings", None))
        log.info("asking the %s model %d questions", name, len(questions))
        before = len(judged) * len(questions)
        show = partial(_show, name, before, len(loaders) * len(questions))
        judged[name] = judge(model, tokenizer, questions, batch_size, max_new_tokens, show)
        if name == "base":
            keep(asked, judged[name])
        del model
        gc.collect()
    return judged, str(dtype).removeprefix("torch.")


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


def _show(name: str, before: int, total: int, done: int) -> None:
    progress(log, before + done, total, name)


def _given(answers: Sequence[Answer], exact_match: Metric) -> list[Given]:
    return [
        Given(answer.text, bool(hit), answer.reference_loss)
        for answer, hit in zip(answers, exact_match.by_row(), strict=True)
    ]


def main() -> None:
    """Judge both models and write what came out."""
    params = load_params().evaluate
    all_rows = read_rows(artifacts("split") / "test.parquet")
    rows = choose_rows(all_rows, params.max_rows, params.min_test_rows, params.seed)
    if params.task == "json":
        read_references(rows, params.label_key)
    tokenizer = load_tokenizer(artifacts("fetch_base"))
    questions = encode_questions(tokenizer, rows)
    limit = answer_limit(questions, params.max_new_tokens)
    over_limit = sum(len(q.reference) > limit for q in questions)
    if over_limit:
        log.warning("%d references are longer than evaluate.max_new_tokens (%d)", over_limit, limit)

    judged, dtype = ask_both(questions, tokenizer, params.batch_size, limit)
    metrics = {
        name: score(rows, questions, judged[name].answers, params.task, params.label_key) for name in judged
    }
    for name in metrics:
        check_finite(metrics[name], name)
    given = {name: _given(judged[name].answers, metrics[name]["exact_match"]) for name in judged}
    found = mistakes(rows, given["base"], given["tuned"], params.task, params.label_key)
    confused = (
        confusions(rows, [g.text for g in given["tuned"]], params.label_key) if params.label_key else []
    )
    primary = PRIMARY[params.task]
    report: dict[str, Any] = {
        "task": params.task,
        "label_key": params.label_key,
        "dtype": dtype,
        "test_rows": len(all_rows),
        "answer_limit_tokens": limit,
        "references_over_limit": over_limit,
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
        "throughput": {name: throughput(judged[name]) for name in judged},
    }

    write_predictions(artifacts("evaluate") / "predictions.parquet", rows, questions, judged, given)
    folder = reports("evaluate")
    write_text(folder / "errors.csv", errors_csv(found))
    write_text(folder / "errors.md", errors_md(found, len(rows), confused, params.errors_shown, params.task))
    with atomic_dir(folder / "pictures") as pictures:
        draw(pictures, report, confused)
    write_json(folder / "metrics.json", report)
    for name in judged:
        best, speed = report[name][primary], report["throughput"][name]["rows_per_s"]
        log.info(
            "%s: %s %.3f (%.3f to %.3f), %.1f rows/s",
            name,
            primary,
            best["value"],
            best["low"],
            best["high"],
            speed,
        )


if __name__ == "__main__":
    run_stage(main)
