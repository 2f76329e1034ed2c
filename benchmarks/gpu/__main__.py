"""Run the parts one after the other, each in a process of its own with a limit, and write the results.

    python -m benchmarks.gpu --out FOLDER [--minutes 10] [--parts numerics,memory,train,task,serve] [--tiny]

`gpu.sh` finds or makes the environments and calls this. FOLDER/gpu.json and gpu.md are written after each
part. The limits of the planned parts add up to less than ten minutes, and a part may also use what earlier
ones left of theirs. What a part had measured when its limit ended it, or when it failed, is kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.models import ARCHITECTURES
from benchmarks.gpu.part import SKIPPED
from benchmarks.gpu.processes import end, fork, start
from benchmarks.gpu.report import format_report, list_goals
from benchmarks.machine import machine
from stages.common.artifacts import write_json, write_text
from stages.common.logs import set_quiet_environment

GROUPS = ("numerics", "memory", "train", "task", "serve")
LEAST_S = 20.0  # a part that has less time left is not begun
TINY_TIMES = 20  # tiny parts have so many times as long: the limits are those of a GPU, and a CPU may be busy


@dataclass(frozen=True, slots=True)
class Part:
    """A module to run.

    Attributes:
        group: the name by which it is chosen.
        limit_s: after which it is ended, unless earlier parts left time.
        serves: whether it runs in the environment of vLLM.
        extra: it gets what the others leave.
    """

    name: str
    group: str
    module: str
    arguments: tuple[str, ...] = ()
    limit_s: float = 60.0
    serves: bool = False
    extra: bool = False


def list_parts() -> list[Part]:
    """Return all parts, what matters most first."""

    def train(model: str, who: str, limit_s: float, extra: bool = False) -> Part:
        arguments = ("--model", model, "--who", who)
        return Part(f"train {model} {who}", "train", "training", arguments, limit_s, extra=extra)

    return [
        Part("numerics", "numerics", "numerics", limit_s=25.0),
        train("llama-8b", "ours", 50.0),
        train("llama-8b", "trl", 80.0),
        train("qwen3-4b", "ours", 40.0),
        train("qwen3-4b", "trl", 60.0),
        Part("serve", "serve", "serving", limit_s=175.0, serves=True),
        Part("task", "task", "task", limit_s=160.0),
        *(train(model, "ours-compiled", 60.0, extra=True) for model in ARCHITECTURES),
        Part("memory", "memory", "memory", limit_s=600.0, extra=True),
    ]


def share_time(part: Part, later: Sequence[Part], left_s: float) -> float:
    """Return the seconds that a part may take: its limit, and what the planned ones after it do not need."""
    planned = sum(other.limit_s for other in later if not other.extra)
    return min(left_s, part.limit_s if part.extra else max(part.limit_s, left_s - planned))


def run(part: Part, python: str, out: Path, tiny: bool, limit: float) -> dict[str, Any]:
    """Run a part; return how it ended, with what it measured and the reason for what it did not."""
    if limit < LEAST_S:
        return {"status": "skipped", "seconds": 0.0, "reason": f"{limit:.0f} s were left of the whole time"}
    result, log = (out / "parts" / f"{part.name.replace(' ', '-')}.{kind}" for kind in ("json", "log"))
    result.parent.mkdir(exist_ok=True)
    result.unlink(missing_ok=True)
    arguments = [*part.arguments, "--result", str(result), *(["--tiny"] if tiny else [])]
    started = time.monotonic()
    begin = fork if tiny and python == sys.executable else start
    running = begin(f"benchmarks.gpu.{part.module}", arguments, log, python)
    try:
        code = running.wait(limit)
    finally:
        end(running)
    seconds = round(time.monotonic() - started, 1)
    written = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    if code == 0 and written:
        return {"status": "measured", "seconds": seconds, "result": written}
    if code == SKIPPED and written:
        return {"status": "skipped", "seconds": seconds, **written}
    kept = {"result": written} if written else {}
    if code is None:
        reason = f"ended after {limit:.0f} s{', with what it had measured by then' if kept else ''}"
        return {"status": "cut" if kept else "failed", "seconds": seconds, "reason": reason, **kept}
    last = log.read_text(encoding="utf-8", errors="replace")[-1500:]
    return {"status": "failed", "seconds": seconds, "reason": last or f"exit code {code}", **kept}


def describe_machine(tiny: bool) -> dict[str, Any]:
    """Return the machine, with its GPU."""
    import torch

    # Not asked through CUDA: that would take memory of the GPU for as long as this process lives.
    names = (
        subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
        if _has("nvidia-smi")
        else None
    )
    gpu = names.stdout.strip().splitlines()[0] if names and names.stdout.strip() else None
    return {**machine(), "gpu": gpu, "torch": torch.__version__, "tiny": tiny}


def _has(program: str) -> bool:
    from shutil import which

    return which(program) is not None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen parts; return 1 if one of them failed or was ended by its limit."""
    set_quiet_environment()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts together")
    parser.add_argument("--parts", default=",".join(GROUPS), help="with commas between")
    parser.add_argument("--tiny", action="store_true", help="tiny models, also on a CPU")
    parser.add_argument("--vllm-python", default=sys.executable, help="the python that has vLLM and BentoML")
    options = parser.parse_args(arguments)
    chosen = options.parts.split(",")
    if unknown := [name for name in chosen if name not in GROUPS]:
        parser.error(f"unknown parts: {', '.join(unknown)}; known: {', '.join(GROUPS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * options.minutes * (TINY_TIMES if options.tiny else 1)
    about, results = describe_machine(options.tiny), dict[str, dict[str, Any]]()
    times = TINY_TIMES if options.tiny else 1
    parts = [replace(part, limit_s=part.limit_s * times) for part in list_parts() if part.group in chosen]
    for number, part in enumerate(parts, 1):
        python = options.vllm_python if part.serves else sys.executable
        limit = share_time(part, parts[number:], until - time.monotonic())
        results[part.name] = run(part, python, options.out, options.tiny, limit)
        print(f"{part.name}: {results[part.name]['status']} in {results[part.name]['seconds']} s", flush=True)
        write_json(
            options.out / "gpu.json", {"machine": about, "parts": results, "goals": list_goals(results)}
        )
        write_text(options.out / "gpu.md", format_report(about, results))
    return int(any(one["status"] in ("failed", "cut") for one in results.values()))


if __name__ == "__main__":
    sys.exit(main())
