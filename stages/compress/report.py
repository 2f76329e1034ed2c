"""What is reported of smaller models: quality with intervals, size, memory, speed; and which is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from services.engines.offline import compute_throughput
from stages.common.machine.memory import MIB
from stages.common.model.generation import EvalPrompt
from stages.common.model.results import Metrics, Sampling, check_finite, compare, score, with_intervals
from stages.common.records import Row
from stages.common.task.protocol import Task
from stages.compress.asking import Asked

EXPORTED = "exported"  # the model of the stage export, which the others are compared with
SMALLEST = "smallest"

Report = dict[str, Any]


def build_report(
    rows: Sequence[Row],
    questions: Sequence[EvalPrompt],
    asked: Mapping[str, Asked],
    evidence: Mapping[str, Mapping[str, Any]],
    task: Task,
    sampling: Sampling,
) -> Report:
    """Return the results of every model and the fronts of the best ones.

    Args:
        asked: by the name of the model, `EXPORTED` among them.
        evidence: of each file: its bytes and how it was written.
    """
    metrics = {name: score(rows, questions, one.found.answers, task) for name, one in asked.items()}
    for name, found in metrics.items():
        check_finite(found, name if name != EXPORTED else "tuned")
    groups = [row.group for row in rows]
    models = {name: _describe(name, metrics, groups, task, sampling, evidence[name]) for name in asked}
    throughput = {name: _measure(one) for name, one in asked.items()}
    return {
        "rows": len(rows),
        "groups": len(set(groups)),
        "primary": task.primary,
        "confidence": sampling.confidence,
        "engine": {name: one.found.engine for name, one in asked.items()},
        "dtype": {name: one.found.dtype for name, one in asked.items()},
        "models": models,
        "fronts": {
            "bytes": find_front(models, lambda name: -models[name]["bytes"], task.primary),
            "tokens_per_s": find_front(
                models, lambda name: throughput[name]["alone_tokens_per_s"], task.primary
            ),
        },
        "throughput": throughput,
    }


def _describe(
    name: str,
    metrics: Mapping[str, Metrics],
    groups: Sequence[str],
    task: Task,
    sampling: Sampling,
    evidence: Mapping[str, Any],
) -> Report:
    difference = compare(metrics[EXPORTED], metrics[name], groups, sampling)
    scale = metrics[name][task.primary].scale or 1.0
    return {
        **evidence,
        "results": with_intervals(metrics[name], groups, sampling),
        "difference": difference,
        "lost_points": round(-100 * difference[task.primary]["value"] / scale, 4),
    }


def _measure(asked: Asked) -> dict[str, float]:
    """Return what differs between equal runs: speeds and memory."""
    return {
        **compute_throughput(asked.found),
        "alone_tokens_per_s": round(asked.alone_tokens_per_s, 1),
        "together_tokens_per_s": round(asked.together_tokens_per_s, 1),
        "peak_memory_mib": asked.peak_bytes // MIB,
    }


def find_front(models: Mapping[str, Report], gain: Callable[[str], float], primary: str) -> list[str]:
    """Return the models that no other one beats (Pareto): as good and more gain, or better and as much.

    Args:
        gain: what is better the more it is.
    """
    places = {name: (gain(name), models[name]["results"][primary]["value"]) for name in models}

    def is_beaten(name: str) -> bool:
        x, y = places[name]
        return any(a >= x and b >= y and (a, b) != (x, y) for a, b in places.values())

    return sorted((name for name in places if not is_beaten(name)), key=lambda name: places[name])


def choose_model(report: Report, wanted: str | None, max_lost_points: float) -> tuple[str | None, str]:
    """Return the variant that goes on, or None for the exported model, and the reason as a sentence.

    By sizes and answers alone: equal runs choose alike.

    Args:
        wanted: None, a variant, or `SMALLEST`.
        max_lost_points: of the primary metric, in hundredths of its scale; for `SMALLEST`.
    """
    models = report["models"]
    if wanted is None:
        return None, "compress.choose is null: the exported model goes on."
    if wanted != SMALLEST:
        return wanted, f"compress.choose is {wanted}."
    fitting = [
        name
        for name, one in models.items()
        if name != EXPORTED
        and one["lost_points"] <= max_lost_points
        and one["bytes"] < models[EXPORTED]["bytes"]
    ]
    if not fitting:
        return None, f"no smaller model loses at most {max_lost_points:g} points: the exported model goes on."
    chosen = min(fitting, key=lambda name: (models[name]["bytes"], name))
    return chosen, f"{chosen} is the smallest that loses at most {max_lost_points:g} points."


def format_table(report: Report) -> Iterator[str]:
    """Yield the lines of a page that compares the models."""
    yield "# Smaller models\n\n"
    if not report["models"]:
        yield "compress.variants is empty: no smaller model was made.\n"
        return
    primary = report["primary"]
    yield (
        f"On {report['rows']} validation rows in {report['groups']} groups, with "
        f"{100 * report['confidence']:g} % intervals, compared with the exported model. Tokens a second of "
        "requests one by one, and of many at once; the memory is that of the whole process.\n\n"
    )
    yield f"| model | MiB | {primary} | lost points | p | tokens/s alone | together | memory, MiB |\n"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|\n"
    for name, one in report["models"].items():
        found, change = one["results"][primary], one["difference"][primary]
        speed = report["throughput"][name]
        quality = f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"
        compared = ["", ""] if name == EXPORTED else [f"{one['lost_points']:.2f}", f"{change['p_value']:.4f}"]
        cells = [
            f"**{name}**" if name == report["chosen"] else name,
            f"{one['bytes'] / MIB:.1f}",
            quality,
            *compared,
            f"{speed['alone_tokens_per_s']:.0f}",
            f"{speed['together_tokens_per_s']:.0f}",
            f"{speed['peak_memory_mib']}",
        ]
        yield f"| {' | '.join(cells)} |\n"
    yield f"\n{report['choice']}\n\n![quality by size and by speed](pareto.svg)\n"
