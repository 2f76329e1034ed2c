"""The table of the results, and what was to be reached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

MFU, OVER_TRL, OVER_VLLM = 0.45, 1.3, 0.95
Results = Mapping[str, Mapping[str, Any]]


def list_goals(results: Results) -> list[dict[str, Any]]:
    """Return what was to be reached and was measured, with whether it was."""
    goals: list[tuple[str, float | None, float]] = []
    for model in ("llama-8b", "qwen3-4b"):
        ours = [one for who in ("ours", "ours-compiled") if (one := read(results, f"train {model} {who}"))]
        peers = [
            one for who in ("trl", "trl-checkpointing") if (one := read(results, f"train {model} {who}"))
        ]
        if not ours:
            continue
        best = max(ours, key=lambda one: float(one["tokens_per_second"]))
        goals.append((f"MFU, {model}", best["mfu"], MFU))
        if peers:
            fastest = max(float(one["tokens_per_second"]) for one in peers)
            goals.append(
                (f"tokens/s against trl, {model}", round(best["tokens_per_second"] / fastest, 2), OVER_TRL)
            )
    for clients, own in read(results, "serve").get("throughput", {}).items():
        if "ratio" in own:
            goals.append((f"tokens/s against bare vLLM, {clients} clients", own["ratio"], OVER_VLLM))
    return [
        {"what": what, "value": value, "goal": goal, "reached": None if value is None else value >= goal}
        for what, value, goal in goals
    ]


def read(results: Results, name: str) -> Mapping[str, Any]:
    """Return what a part measured; empty if it did not."""
    part = results.get(name, {})
    found: Mapping[str, Any] = part["result"] if part.get("status") == "measured" else {}
    return found


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
    trained = {name: read(results, name) for name in results if name.startswith("train ")}
    if not any(trained.values()):
        return
    yield "| LoRA, random weights | tokens/s | MFU | of products | peak, MiB | layers twice | seconds |"
    yield "|---|---:|---:|---:|---:|---|---:|"
    for name, one in trained.items():
        if one:
            mfu = "–" if one["mfu"] is None else f"{one['mfu']:.1%}"
            peak = "–" if one["peak_memory_mib"] is None else f"{one['peak_memory_mib']:,}"
            twice = "yes" if one["gradient_checkpointing"] else "no"
            yield (
                f"| {name.removeprefix('train ')} | {one['tokens_per_second']:,.0f} | {mfu} | "
                f"{one['product_share']:.1%} | {peak} | {twice} | {one['seconds']} |"
            )
    yield ""


def _format_serving(results: Results) -> Iterator[str]:
    if task := read(results, "task"):
        judged = "" if task["exact_match"] is None else f", exact match {task['exact_match']:.3f}"
        yield f"The default task: {task['minutes']} minutes{judged}."
        yield ""
    served = read(results, "serve")
    if not served:
        return
    yield f"| {served['engine']}, clients | service, tokens/s | bare vLLM | share | first text, s | bare |"
    yield "|---:|---:|---:|---:|---:|---:|"
    for clients, own in served["throughput"].items():
        bare = own.get("bare", {})
        yield (
            f"| {clients} | {own['ours']['tokens_per_second']:,.0f} | {bare.get('tokens_per_second', '–')} | "
            f"{own.get('ratio', '–')} | {own['ours']['first_text_s']} | {bare.get('first_text_s', '–')} |"
        )
    swap, two = served["swap"], served["two_versions"]
    yield ""
    yield (
        f"A change of version under load: {swap['failed']} of {swap['answers']} answers failed, the new "
        f"one answered after {swap['first_answer_of_the_new_s']} s. Two versions at once: "
        f"{two['failed']} failed, answers by version {two['answers_by_version']}."
    )
    yield ""


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
