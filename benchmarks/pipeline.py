"""The whole pipeline from a clean clone: times, memory, and what a second run repeats.

    python -m benchmarks.pipeline [--twice] [--folder FOLDER]

Clones this repository's HEAD into FOLDER (default: a new temporary folder), runs `make run`, and then
- `make run` again with nothing changed, without a Prefect server and with one (no stage may run);
- `make run` after a parameter of `evaluate` has changed (`evaluate` and `model_card` run, and no other);
- with `--twice`, run a second clone with plain `dvc repro`: its data, adapter and metrics must be equal.
Prints a JSON object; `docs/benchmarks.md` keeps the results.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.machine import machine

ROOT = Path(__file__).parents[1]
SAMPLE_S = 0.25
# Timing is the only evidence that may differ between two runs of one commit.
VARIES = "throughput"


def measured(command: list[str], folder: Path, log: Path, **environment: str) -> dict[str, Any]:
    """Run a command; return its exit code, seconds, and the peak memory of all its processes in MiB."""
    started = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=folder, stdout=out, stderr=subprocess.STDOUT, env=_clean_environment() | environment
        )
        peak, done = [0], threading.Event()
        watcher = threading.Thread(target=_watch_memory, args=(process.pid, peak, done))
        watcher.start()
        code = process.wait()
        done.set()
        watcher.join()
    return {"exit": code, "seconds": round(time.monotonic() - started, 1), "peak_mib": peak[0] // 2**20}


def _watch_memory(pid: int, peak: list[int], done: threading.Event) -> None:
    """Record the peak proportional memory (PSS) of a process and all its descendants."""
    while not done.wait(SAMPLE_S):
        total = 0
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(pid)
            for process in (root, *root.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    total += process.memory_info().rss
        peak[0] = max(peak[0], total)


def _clean_environment() -> dict[str, str]:
    """Return the environment without the caller's virtual environment and Prefect server."""
    kept = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH", "PREFECT_API_URL")}
    own = str(Path(sys.executable).parent)
    kept["PATH"] = os.pathsep.join(p for p in kept["PATH"].split(os.pathsep) if p != own)
    return kept


def make_environment(home: Path) -> dict[str, str]:
    """Return what a command in a clone needs, to run with this Python and the clone's own code."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {"PATH": path, "PYTHONPATH": str(home)}


def clone(folder: Path) -> Path:
    """Clone HEAD into `folder`."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    return folder


def written_at(folder: Path) -> dict[str, int]:
    """Return when each stage's evidence was written, in nanoseconds."""
    return {
        path.parent.name: path.stat().st_mtime_ns for path in folder.glob("reports/*/*") if path.is_file()
    }


@contextlib.contextmanager
def prefect_server(folder: Path, log: Path) -> Iterator[str]:
    """Run the clone's Prefect server on a free port; yield the URL of its API."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(folder / ".venv/bin/prefect"),
        "server",
        "start",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    environment = _clean_environment() | {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_HOME": str(folder / ".perennial" / "benchmark-server"),
    }
    with log.open("w") as out:
        server = subprocess.Popen(
            command, cwd=folder, stdout=out, stderr=out, env=environment, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}/api"
    try:
        for _ in range(120):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=2)
                break
            time.sleep(1)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)


def outputs(folder: Path) -> dict[str, str]:
    """Return a digest of every artifact and of every metrics file without its timing."""
    found = {}
    for path in sorted((folder / "artifacts").rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted((folder / "reports").glob("*/metrics.json")):
        evidence = {k: v for k, v in json.loads(path.read_text()).items() if k != VARIES}
        text = json.dumps(evidence, sort_keys=True)
        found[str(path.relative_to(folder))] = hashlib.sha256(text.encode()).hexdigest()
    return found


def change_evaluate(folder: Path) -> None:
    """Show one more error in the table: a parameter of `evaluate` that changes no metric."""
    path = folder / "params.yaml"
    shown = yaml.safe_load(path.read_text())["evaluate"]["errors_shown"]
    path.write_text(path.read_text().replace(f"errors_shown: {shown}", f"errors_shown: {shown + 1}"))


def main() -> None:
    """Measure, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--twice", action="store_true", help="build a second clone by dvc repro and compare")
    parser.add_argument("--folder", type=Path, help="where to clone to; kept afterwards")
    arguments = parser.parse_args()
    base = arguments.folder or Path(tempfile.mkdtemp(prefix="perennial-benchmark-"))
    base.mkdir(parents=True, exist_ok=True)
    folder = clone(base / "first")
    result: dict[str, Any] = {"machine": machine()}

    def step(name: str, command: list[str], where: Path = folder, **environment: str) -> None:
        before = written_at(where)
        result[name] = measured(command, where, base / f"{name}.log", **environment)
        after = written_at(where)
        result[name]["stages_run"] = sorted(stage for stage in after if after[stage] != before.get(stage))
        sys.stderr.write(f"{name}: {result[name]}\n")

    step("clean_clone", ["make", "run"])
    evaluated = json.loads((folder / "reports/evaluate/metrics.json").read_text())
    result["model"] = {
        who: {name: evaluated[who][name] for name in evaluated[who]} for who in ("base", "tuned")
    }
    result["throughput"] = {
        stage: json.loads((folder / f"reports/{stage}/metrics.json").read_text()).get(VARIES)
        for stage in ("finetune", "evaluate")
    }
    step("again_without_server", ["make", "run"])
    with prefect_server(folder, base / "server.log") as url:
        step("again_with_server", ["make", "run"], PREFECT_API_URL=url)
    before = outputs(folder)
    change_evaluate(folder)
    step("evaluate_changed", ["make", "run"])
    if arguments.twice:
        second = clone(base / "second")
        step("second_clone_install", ["make", ".venv/.core"], second)
        step(
            "second_clone_dvc_repro",
            ["dvc", "repro"],
            second,
            PATH=f"{second / '.venv/bin'}:{_clean_environment()['PATH']}",
        )
        after = outputs(second)
        result["differs_in_second_clone"] = sorted(k for k in before | after if before.get(k) != after.get(k))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
