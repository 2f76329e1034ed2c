"""Time from a clean clone to the printed result, on this machine and as if it had no bfloat16.

    python -m benchmarks.first_hour [--only bfloat16 | --only float32] [--out first_hour.json]

Clones HEAD, runs `make run`, and records when each part was done: the installation, each stage's metrics, the
printed result. The case without bfloat16 sets `ATEN_CPU_CAPABILITY=avx2` and `ONEDNN_MAX_CPU_ISA=AVX2` for
torch, and `dtype: float32` for training and for the questions (OpenVINO ignores those two variables).
Run it on an idle machine, since it measures wall-clock time. Prints a Markdown table;
`docs/benchmarks.md` keeps it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.machine import machine
from benchmarks.pipeline import clone, measured

INSTALLED = ".venv/.core"  # made when the installation is done
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
CHECK = "import torch; print(torch.backends.cpu.get_cpu_capability())"


@dataclass(frozen=True, slots=True)
class Hour:
    """One `make run` from a clean clone.

    Attributes:
        seconds: until the result was printed.
        done: seconds until each part was done, in that order.
        exact_match: value, low and high of the tuned model.
        tokens_per_s: of training.
    """

    kind: str
    exit_code: int
    seconds: float
    peak_mib: int
    done: dict[str, float]
    exact_match: tuple[float, float, float] | None
    tokens_per_s: float | None
    engine: Mapping[str, str] | None
    dtypes: Mapping[str, str]


def run(kind: str, base: Path) -> Hour:
    """Clone, run, and return what was measured."""
    folder = clone(base / kind)
    environment = {}
    if kind == "float32":
        environment = AVX2
        set_float32(folder / "params.yaml")
    started = time.time()
    whole = measured(["make", "run"], folder, base / f"{kind}.log", **environment)
    if kind == "float32":
        check_avx2(folder)
    done = {}
    if (folder / INSTALLED).exists():
        done["installation"] = (folder / INSTALLED).stat().st_mtime - started
    for path in folder.glob("reports/*/metrics.json"):
        done[path.parent.name] = path.stat().st_mtime - started
    reports = {
        path.parent.name: json.loads(path.read_text()) for path in folder.glob("reports/*/metrics.json")
    }
    found = reports.get("evaluate", {}).get("tuned", {}).get("exact_match")
    return Hour(
        kind,
        whole["exit"],
        whole["seconds"],
        whole["peak_mib"],
        {name: round(at, 1) for name, at in sorted(done.items(), key=lambda item: item[1])},
        (found["value"], found["low"], found["high"]) if found else None,
        reports.get("finetune", {}).get("throughput", {}).get("tokens_per_second"),
        reports.get("evaluate", {}).get("engine"),
        {name: reports[name]["dtype"] for name in ("ask_base", "finetune", "evaluate") if name in reports},
    )


def set_float32(path: Path) -> None:
    """Set training and evaluation to float32."""
    params = yaml.safe_load(path.read_text(encoding="utf-8"))
    params["finetune"]["dtype"] = params["ask_base"]["dtype"] = "float32"
    path.write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")


def check_avx2(folder: Path) -> None:
    """Stop if torch uses more than AVX2."""
    python = str(folder / ".venv/bin/python")
    found = subprocess.run([python, "-c", CHECK], env=AVX2, capture_output=True, text=True).stdout.strip()
    if found != "AVX2":
        sys.exit(f"torch computes with {found}, not AVX2: the float32 run is not what it should be")


def format_table(hours: list[Hour]) -> str:
    """Return a Markdown table: when each part was done, and the time since the part before, by machine."""
    names = list(dict.fromkeys(name for hour in hours for name in hour.done))
    lines = [
        "| done after | " + " | ".join(hour.kind for hour in hours) + " |",
        "|---|" + "---:|" * len(hours),
    ]
    for name in names:
        lines.append(f"| {name} | " + " | ".join(_cell(hour.done, name) for hour in hours) + " |")
    lines.append("| **printed result** | " + " | ".join(f"**{_clock(h.seconds)}**" for h in hours) + " |")
    lines.append("| exact match | " + " | ".join(_match(hour) for hour in hours) + " |")
    lines.append("| training, tokens/s | " + " | ".join(f"{h.tokens_per_s or 0:.0f}" for h in hours) + " |")
    lines.append("| peak memory, MiB | " + " | ".join(f"{h.peak_mib:,}" for h in hours) + " |")
    return "\n".join(lines) + "\n"


def _cell(done: Mapping[str, float], name: str) -> str:
    if name not in done:
        return "–"
    before = max((at for at in done.values() if at < done[name]), default=0.0)
    return f"{_clock(done[name])} (+{_clock(done[name] - before)})"


def _match(hour: Hour) -> str:
    if hour.exact_match is None:
        return f"exit {hour.exit_code}"
    value, low, high = hour.exact_match
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def _clock(seconds: float) -> str:
    return f"{round(seconds) // 60}:{round(seconds) % 60:02d}"


def main() -> None:
    """Measure one kind of machine or both, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=("bfloat16", "float32"))
    parser.add_argument("--folder", type=Path, help="where to clone to; kept afterwards")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    options = parser.parse_args()
    base = options.folder or Path(tempfile.mkdtemp(prefix="perennial-first-hour-"))
    base.mkdir(parents=True, exist_ok=True)
    hours = [run(kind, base) for kind in ("bfloat16", "float32") if options.only in (None, kind)]
    print(format_table(hours))
    result: dict[str, Any] = {"machine": machine(), "runs": [asdict(hour) for hour in hours]}
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
