"""The table of the results, and what was to be reached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.gpu.models import ARCHITECTURES

MFU, OVER_TRL, OVER_VLLM = 0.45, 1.3, 0.95
Results = Mapping[str, Mapping[str, Any]]


def list_goals(results: Results) -> list[dict[str, Any]]:
    """Return what was to be reached and was measured, with whether it was.

    Ours is what the pipeline runs; layers that only this benchmark compiles reach no goal.
    """
    goals: list[tuple[str, float | None, float]] = []
    for model in ARCHITECTURES:
        ours, peer = (find_fastest(read(results, f"train {model} {who}")) for who in ("ours", "trl"))
        if not ours:
            continue
        goals.append((f"MFU, {model}", ours["mfu"], MFU))
        if peer:
            ratio = round(ours["tokens_per_second"] / peer["tokens_per_second"], 2)
            goals.append((f"tokens/s against trl, {model}", ratio, OVER_TRL))
    for clients, own in read(results, "serve").get("throughput", {}).items():
        if "ratio" in own:
            goals.append((f"tokens/s against bare vLLM, {clients} clients", own["ratio"], OVER_VLLM))
    return [
        {"what": what, "value": value, "goal": goal, "reached": None if value is None else value >= goal}
        for what, value, goal in goals
    ]


def read(results: Results, name: str) -> Mapping[str, Any]:
    """Return what a part measured, if only until its limit ended it or it failed; empty if nothing."""
    found: Mapping[str, Any] = results.get(name, {}).get("result", {})
    return found


def find_fastest(trained: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the figures of the fastest of the settings that were tried; empty if none trained."""
    tried = [one for one in trained.get("tried", {}).values() if "tokens_per_second" in one]
    return max(tried, key=lambda one: float(one["tokens_per_second"]), default={})


def format_report(about: Mapping[str, Any], results: Results) -> str:
    """Return all results as Markdown."""
    lines = [
        f"{about['gpu'] or 'No GPU'}, {about['cores']} cores of {about['processor']}, "
        f"{about['memory_gib']} GiB, "
        f"torch {about['torch']}, Python {about['python']}, {about['date']}"
        f"{'; tiny models: the figures say nothing about speed' if about['tiny'] else ''}.",
        "",
        *_format_training(results),
        *_format_serving(results),
        *_format_goals(results),
        "| part | | seconds | |",
        "|---|---|---:|---|",
        *(
            f"| {name} | {part['status']} | {part['seconds']} | {_shorten(str(part.get('reason', '')))} |"
            for name, part in results.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _format_training(results: Results) -> Iterator[str]:
    lines = [
        _format_setting(name.removeprefix("train "), setting, one)
        for name in results
        if name.startswith("train ")
        for setting, one in read(results, name).get("tried", {}).items()
    ]
    if not lines:
        return
    yield "| LoRA, random weights | attention | tokens/s | MFU | of products | peak, MiB | layers twice | s |"
    yield "|---|---|---:|---:|---:|---:|---|---:|"
    yield from lines
    yield ""


def _format_setting(name: str, setting: str, one: Mapping[str, Any]) -> str:
    if "tokens_per_second" not in one:
        return f"| {name}, {setting} | {_shorten(one['reason'])} |"
    mfu = "–" if one["mfu"] is None else f"{one['mfu']:.1%}"
    peak = "–" if one["peak_memory_mib"] is None else f"{one['peak_memory_mib']:,}"
    twice = "yes" if one["gradient_checkpointing"] else "no"
    return (
        f"| {name}, {setting} | {one['attention']} | {one['tokens_per_second']:,.0f} | {mfu} | "
        f"{one['product_share']:.1%} | {peak} | {twice} | {one['seconds']} |"
    )


def _format_serving(results: Results) -> Iterator[str]:
    if task := read(results, "task"):
        yield _format_task(task)
        yield ""
    served = read(results, "serve")
    if not served:
        return
    yield f"| {served['engine']}, clients | service, tokens/s | bare vLLM | share | first text, s | bare |"
    yield "|---:|---:|---:|---:|---:|---:|"
    for clients, own in served.get("throughput", {}).items():
        bare = own.get("bare", {})
        yield (
            f"| {clients} | {own['ours']['tokens_per_second']:,.0f} | {bare.get('tokens_per_second', '–')} | "
            f"{own.get('ratio', '–')} | {own['ours']['first_text_s']} | {bare.get('first_text_s', '–')} |"
        )
    yield ""
    if isinstance(reason := served.get("bare"), str):
        yield f"Bare vLLM: {_shorten(reason)}."
    yield (
        f"A change of version under load: {swap['failed']} of {swap['answers']} answers failed, the new "
        f"one answered after {swap['first_answer_of_the_new_s']} s."
        if (swap := served.get("swap"))
        else "A change of version under load: not measured."
    )
    yield (
        f"Two versions at once: {two['failed']} failed, answers by version {two['answers_by_version']}."
        if (two := served.get("two_versions"))
        else "Two versions at once: not measured."
    )
    yield ""


def _format_task(task: Mapping[str, Any]) -> str:
    """Return minutes and exact match of the default task, and which stages they are of."""
    judged = "" if task["exact_match"] is None else f", exact match {task['exact_match']:.3f}"
    missing = ", ".join(task["not_run"])
    return f"The default task: {task['minutes']} minutes{judged}{f'; without {missing}' if missing else ''}."


def _format_goals(results: Results) -> Iterator[str]:
    if goals := list_goals(results):
        yield "| goal | reached | asked | |"
        yield "|---|---:|---:|---|"
        for goal in goals:
            value = "–" if goal["value"] is None else goal["value"]
            yield f"| {goal['what']} | {value} | ≥ {goal['goal']} | {_tell(goal['reached'])} |"
        yield ""


def _tell(reached: bool | None) -> str:
    return "not measured" if reached is None else "yes" if reached else "**no**"


def _shorten(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].replace("|", "/")[:200] if lines else ""
