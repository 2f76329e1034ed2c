"""Benchmark the service and its peers: speed, constrained answers, soak, overload, kill -9, version switch.

    python -m benchmarks.serving [--rounds 3] [--seconds 8] [--soak-s 120] [--quick]
        [--only throughput,constrained,soak,overload,kill,switch] [--out serving.json]
        [--contenders transformers,bare,openvino,llama.cpp,ctranslate2,perennial]

Needs the pipeline's output up to `export` (`dvc repro export evaluate`). The service runs with the parameters
of this checkout, in a separate folder under `.perennial`, with its own events and model store; the models
that this checkout serves are not touched. Every server is a separate process on 127.0.0.1. Peers that are not
installed (xllamacpp, ctranslate2) are skipped and named. Prints Markdown; `docs/benchmarks.md` keeps the
results.

Other load on the machine slows some engines more than others: on busy cores llama.cpp is fifty times
slower, because its threads wait for each other. Run it on an idle machine, or with a higher priority
(`nice -n -10`), which its child processes inherit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.serving_peers import (
    NotStarted,
    Questions,
    Workspace,
    read_questions,
    workspace,
)
from benchmarks.serving_report import CONTENDERS, Plan, Report, note
from benchmarks.serving_speed import constrained, throughput
from benchmarks.serving_trials import kill, overload, soak, switch

Section = Callable[[Workspace, Questions, Plan], Awaitable[Report]]
SECTIONS: dict[str, tuple[str, Section]] = {
    "throughput": ("Throughput and waiting times", throughput),
    "constrained": ("Constrained decoding", constrained),
    "soak": ("Soak", soak),
    "overload": ("Overload", overload),
    "kill": ("kill -9 under load", kill),
    "switch": ("Switching versions under load", switch),
}


async def measure(names: Sequence[str], plan: Plan) -> dict[str, Any]:
    """Run the sections one after the other, print each when it ends, and return all results."""
    questions, found = read_questions(), dict[str, Any]()
    with workspace() as place:
        for name in names:
            title, section = SECTIONS[name]
            note(f"{name} …")
            try:
                report = await section(place, questions, plan)
            except NotStarted as error:
                report = Report([f"Not measured: {error}", ""])
            found[name] = report.figures
            print(f"## {title}\n")
            print("\n".join(report.lines), flush=True)
    return found


def main() -> None:
    """Run the chosen sections, and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of a turn, at least")
    parser.add_argument("--soak-s", type=float, default=120.0)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="in the throughput")
    parser.add_argument("--quick", action="store_true", help="one round of short turns, to see that it runs")
    parser.add_argument("--out", type=Path, help="also write all figures to this file, as JSON")
    arguments = parser.parse_args()
    names, who = arguments.only.split(","), tuple(arguments.contenders.split(","))
    for given, known in ((names, SECTIONS), (who, CONTENDERS)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    plan = Plan(arguments.rounds, arguments.seconds, arguments.soak_s, contenders=who)
    if arguments.quick:
        plan = Plan(1, 3.0, 15.0, 1, who)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what we started ends with us
    about_machine = machine()
    print(
        f"Machine: {about_machine['cores']} cores of {about_machine['processor']}"
        f" ({', '.join(about_machine['bf16']) or 'no bf16'}), {about_machine['memory_gib']} GiB,"
        f" {about_machine['platform']}, Python {about_machine['python']}. Date: {about_machine['date']}."
        f" Load before: {os.getloadavg()[0]:.1f}. Rounds: {plan.rounds}; turns of {plan.seconds:g} s.\n",
        flush=True,
    )
    try:
        found = asyncio.run(measure(names, plan))
    except KeyboardInterrupt:
        sys.exit("interrupted; what was started has ended")
    if arguments.out:
        text = json.dumps({"machine": about_machine, **found}, indent=2)
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
