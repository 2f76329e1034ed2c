"""Compute metrics with intervals from two models' answers: differences, slices and classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stages.common.chat.turns import TURN
from stages.common.errors import InputError
from stages.common.model.generation import Answer, EvalPrompt
from stages.common.records import Row
from stages.common.statistics.intervals import Interval, estimate_difference, estimate_interval, sum_by_group
from stages.common.statistics.sizes import describe_resolution
from stages.common.task.label_metrics import list_classes
from stages.common.task.metrics import Metric, compute_mean, compute_perplexity, compute_share
from stages.common.task.protocol import Task

# The metrics of every kind of task; those of the task come first.
COMMON_MEANINGS = {
    "finished": "answers that end by themselves before the limit",
    "perplexity": "of the reference answers, by token; lower is better",
    "answer_tokens": "mean length of an answer in tokens",
}

LAST_TURN = 5  # from which on turns are one slice
AFTER_RESULT = "after_result"

Metrics = dict[str, Metric]
Results = dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How intervals and tests are computed."""

    confidence: float
    resamples: int
    seed: int


def score(
    rows: Sequence[Row], questions: Sequence[EvalPrompt], answers: Sequence[Answer], task: Task
) -> Metrics:
    """Return every metric of one model's answers, those of the task first."""
    found = task.score([answer.text for answer in answers], [row.answer for row in rows])
    return {
        **{name: found[name] for name in task.meanings if name in found},
        "finished": compute_share([answer.complete for answer in answers]),
        "perplexity": compute_perplexity(
            [a.reference_loss for a in answers], [len(q.reference) for q in questions]
        ),
        "answer_tokens": compute_mean([float(answer.tokens) for answer in answers], scale=None),
    }


def check_finite(metrics: Metrics, model: str) -> None:
    """Raise InputError if a model's perplexity is not finite: its weights are broken."""
    value = metrics["perplexity"].value()
    if not math.isfinite(value):
        raise InputError(
            f"the {model} model's perplexity of the rows' answers is {value}",
            "the training has diverged: lower finetune.learning_rate and train again"
            if model == "tuned"
            else "the base model's weights are broken: remove artifacts/fetch_base and fetch it again",
        )


def describe_metrics(metrics: Metrics, task: Task) -> list[dict[str, Any]]:
    """Return name, meaning and scale of each metric, in the order in which they are shown."""
    meanings = {**task.meanings, **COMMON_MEANINGS}
    return [
        {"name": name, "meaning": meanings[name], "scale": metric.scale} for name, metric in metrics.items()
    ]


def with_intervals(metrics: Metrics, groups: Sequence[str], sampling: Sampling) -> Results:
    """Return each metric as value, low, high and n."""
    return {
        name: {**_rounded(asdict(_interval(metric, groups, sampling))), "n": len(groups)}
        for name, metric in metrics.items()
    }


def compare(base: Metrics, tuned: Metrics, groups: Sequence[str], sampling: Sampling) -> Results:
    """Return tuned minus base for each metric, with interval, p-value and n."""
    return {
        name: {
            **_rounded(
                asdict(
                    estimate_difference(
                        sum_by_group(base[name].columns, groups),
                        sum_by_group(metric.columns, groups),
                        metric.statistic,
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


def slice_rows(rows: Sequence[Row], task: Task, tags: Sequence[str]) -> dict[str, list[str | None]]:
    """Return the value of each row by slice: the class of its reference, the turn, then each tag.

    Where answers may call tools, `after_result` is whether an answer follows the result of a call.
    """
    found: dict[str, list[str | None]] = {}
    if task.class_name:
        found[task.class_name] = [task.read_class(row.answer) for row in rows]
    if any(TURN in row.tags for row in rows):
        found[TURN] = [_name_turn(row.tags.get(TURN, "1")) for row in rows]
    if task.kind == "tools" and any(map(_is_after_result, rows)):
        found[AFTER_RESULT] = ["yes" if _is_after_result(row) else "no" for row in rows]
    return {**found, **{tag: [row.tags.get(tag) for row in rows] for tag in tags if tag not in found}}


def _is_after_result(row: Row) -> bool:
    return bool(row.prompt) and row.prompt[-1].role == "tool"


def _name_turn(turn: str) -> str:
    """Return which question of its conversation a row answers; the later ones, of which few are, together."""
    return turn if not turn.isdecimal() or int(turn) < LAST_TURN else f"{LAST_TURN} and later"


def compute_slice_results(
    rows: Sequence[Row], metric: Metric, slices: Mapping[str, Sequence[str | None]], sampling: Sampling
) -> dict[str, Results]:
    """Return the metric for the rows of each value of each slice; a slice without values is empty."""
    found: dict[str, Results] = {}
    for name, values in slices.items():
        found[name] = {}
        for value in sorted({value for value in values if value is not None}):
            places = [i for i, one in enumerate(values) if one == value]
            groups = [rows[i].group for i in places]
            part = Metric(metric.columns[places], metric.statistic, metric.scale)
            result = with_intervals({"it": part}, groups, sampling)["it"]
            found[name][value] = {**result, "groups": len(set(groups))}
    return found


def compute_class_results(rows: Sequence[Row], answers: Sequence[str], task: Task) -> list[dict[str, Any]]:
    """Return precision, recall, F1 and rows of each class; nothing for a task without classes."""
    if task.class_name is None:
        return []
    answered, expected = read_classes(rows, answers, task)
    return [_rounded_class(asdict(found)) for found in list_classes(answered, expected)]


def read_classes(
    rows: Sequence[Row], answers: Sequence[str], task: Task
) -> tuple[list[str | None], list[str]]:
    """Return the class of each answer and of each reference."""
    return [task.read_class(text) for text in answers], [task.read_class(row.answer) or "" for row in rows]


def summarise(
    rows: Sequence[Row], metrics: Mapping[str, Metrics], task: Task, tags: Sequence[str], sampling: Sampling
) -> dict[str, Any]:
    """Return the results of both models, of their difference, and of the tuned one by slice."""
    groups = [row.group for row in rows]
    primary = metrics["tuned"][task.primary]
    resolution = describe_resolution(
        task.primary.replace("_", " "),
        _interval(primary, groups, sampling),
        primary.scale or 1.0,
        sampling.confidence,
        len(rows),
        groups,
    )
    return {
        "rows": len(rows),
        "groups": len(set(groups)),
        "primary": task.primary,
        "confidence": sampling.confidence,
        "resamples": sampling.resamples,
        "metrics": describe_metrics(metrics["tuned"], task),
        "resolution": asdict(resolution),
        **{name: with_intervals(metrics[name], groups, sampling) for name in metrics},
        "difference": compare(metrics["base"], metrics["tuned"], groups, sampling),
        "slices": compute_slice_results(rows, primary, slice_rows(rows, task, tags), sampling),
    }


def _interval(metric: Metric, groups: Sequence[str], sampling: Sampling) -> Interval:
    return estimate_interval(
        sum_by_group(metric.columns, groups),
        metric.statistic,
        sampling.confidence,
        sampling.resamples,
        sampling.seed,
        metric.scale,
    )


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    """Six digits: more than the interval warrants, fewer than rounding of sums can disturb."""
    return {name: round(value, 6) for name, value in values.items()}


def _rounded_class(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: round(v, 6) if isinstance(v, float) else v for name, v in values.items()}
