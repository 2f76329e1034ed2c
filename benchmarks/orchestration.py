"""Overhead of Prefect: the training flow compared with plain `dvc repro` on the same graph.

    python -m benchmarks.orchestration [--stages 9] [--seconds 2] [--repeats 3]

Builds a checkout with a graph of stages that only sleep: one independent stage, like `fetch_base`, and a
chain of the others. Then it runs, in turn and `--repeats` times, first without any outputs and again with
nothing changed: `dvc repro`; the flow without a server; the flow with a server; and the flow without a server
and with an empty PREFECT_HOME, as on a new machine, where Prefect first creates its database. Prints a
table on stderr and a JSON object with medians on stdout; `docs/benchmarks.md` keeps the results.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from benchmarks.machine import machine
from flows.common import prefect_api, processes
from stages.common import network

ROOT = Path(__file__).parents[1]
COLD, AGAIN = "from nothing", "nothing changed"
DVC, ALONE, WITH_SERVER, NEW_MACHINE = "dvc repro", "flow, no server", "flow, server up", "flow, new machine"
COMMANDS = {
    DVC: ["-m", "dvc", "repro"],
    ALONE: ["-m", "flows.training"],
    WITH_SERVER: ["-m", "flows.training"],
    NEW_MACHINE: ["-m", "flows.training"],
}


def main() -> None:
    """Measure, and print the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", type=int, default=9, help="stages in the graph (default 9)")
    parser.add_argument("--seconds", type=float, default=2.0, help="that each of them sleeps (default 2)")
    parser.add_argument("--repeats", type=int, default=3, help="of the whole series (default 3)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        times = measure(Path(folder), options.stages, options.seconds, options.repeats)
    report = {
        "machine": machine(),
        "stages": options.stages,
        "seconds_each": options.seconds,
        "repeats": options.repeats,
        "median_s": {
            way: {case: round(statistics.median(all_s), 2) for case, all_s in cases.items()}
            for way, cases in times.items()
        },
        "all_s": times,
    }
    sys.stderr.write(table(report["median_s"]))
    json.dump(report, sys.stdout, indent=2)
    sys.stdout.write("\n")


def measure(folder: Path, stages: int, seconds: float, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of every run, by method and case."""
    times: dict[str, dict[str, list[float]]] = {way: {COLD: [], AGAIN: []} for way in COMMANDS}
    home = folder / "prefect"
    with server_at(home) as url:
        for number in range(repeats):
            for way, command in COMMANDS.items():
                checkout = make_checkout(folder / f"{number}-{way.replace(' ', '-')}", stages, seconds)
                environment = environment_of(way, home, folder / f"new-{number}", url)
                for case in (COLD, AGAIN):
                    times[way][case].append(timed([sys.executable, *command], checkout, environment))
    return times


def environment_of(way: str, home: Path, new_home: Path, url: str) -> dict[str, str]:
    """Return the environment variables for a method."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    if way == WITH_SERVER:
        return {**kept, "PREFECT_HOME": str(home), "PREFECT_API_URL": url}
    return {**kept, "PREFECT_HOME": str(new_home if way == NEW_MACHINE else home)}


def timed(command: list[str], folder: Path, environment: dict[str, str]) -> float:
    """Run a command that must succeed; return its seconds."""
    started = time.monotonic()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return round(seconds, 3)


def make_checkout(folder: Path, stages: int, seconds: float) -> Path:
    """Make a git and DVC repository with a graph of stages that sleep."""
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "params.yaml", folder)
    (folder / "in.txt").write_text("in\n")
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": graph(stages, seconds)}))
    subprocess.run(["git", "init", "-q", "."], cwd=folder, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=folder, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "config", "core.analytics", "false"], cwd=folder, check=True)
    return folder


def graph(stages: int, seconds: float) -> dict[str, Any]:
    """Return the stages of dvc.yaml: a chain, and an independent stage that the last but one also needs."""
    names = [f"stage_{number}" for number in range(stages)]
    independent, *chain = names
    needs = {name: [before] for name, before in zip(chain[1:], chain, strict=False)}
    needs[chain[-1]] = [*needs.get(chain[-1], []), independent]
    return {
        name: {
            # Made from its name and inputs, so that no two checkouts differ.
            "cmd": f"sleep {seconds} && echo {name} > {name}.txt",
            "deps": ["in.txt", *(f"{needed}.txt" for needed in needs.get(name, []))],
            "outs": [f"{name}.txt"],
        }
        for name in names
    }


@contextmanager
def server_at(home: Path) -> Iterator[str]:
    """Run a Prefect server with its services; yield the address of its API."""
    port = network.free_port()
    url = f"http://127.0.0.1:{port}/api"
    os.environ["PREFECT_HOME"] = str(home)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    process = processes.start(command, home / "server.log")
    try:
        prefect_api.wait_until_up(url, process)
        yield url
    finally:
        processes.stop(process)


def table(medians: dict[str, dict[str, float]]) -> str:
    """Return the medians as lines, each with its overhead over `dvc repro`."""
    lines = [f"{'median seconds':<20}{COLD:>14}{'':>8}{AGAIN:>18}"]
    for way, cases in medians.items():
        added = f"+{cases[COLD] - medians[DVC][COLD]:.1f}" if way != DVC else ""
        lines.append(f"{way:<20}{cases[COLD]:>14.1f}{added:>8}{cases[AGAIN]:>18.1f}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
