"""A checkout with a small DVC graph, and the training flow run on it as a user would."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

ROOT = Path(__file__).parents[2]

# What a stage does is in the words behind its name: they are files it reads, after the one it writes.
STAGE = """
import pathlib, signal, sys, time
name, seconds, out, *inputs = sys.argv[1:]

def say(message):
    print(f"{name}: {message}", file=sys.stderr, flush=True)

def order(name):
    path = pathlib.Path(f"faults/{name}")
    return path.read_text() if path.exists() else None

with open("faults/ran", "a") as ran:
    ran.write(f"{name} begin {time.time()}\\n")
say("begins")
until = time.monotonic() + float(seconds)
if order(f"{name}-slow"):
    until += float(order(f"{name}-slow"))
while time.monotonic() < until:
    time.sleep(0.02)
if event := order(f"{name}-waits"):  # for another stage's event, as "read end"
    patience = time.monotonic() + 300
    while f"{event} " not in pathlib.Path("faults/ran").read_text():
        if time.monotonic() > patience:
            sys.exit(f"error: {event} did not come in 300 s")
        time.sleep(0.02)
for step in range(1, 201):
    say(f"progress {step}/200 loss 0.5")
if order(f"{name}-fails"):
    code, lines = order(f"{name}-fails").split(" ", 1)
    if order(f"{name}-recovers"):
        pathlib.Path(f"faults/{name}-fails").unlink()
    print(lines, file=sys.stderr)
    sys.exit(int(code))
pathlib.Path(out).write_text(name + "".join(pathlib.Path(path).read_text() for path in inputs))
say(f"wrote {out}")
with open("faults/ran", "a") as ran:
    ran.write(f"{name} end {time.time()}\\n")
"""

GRAPH = """
stages:
  fetch:
    cmd: python work/stage.py fetch {seconds} fetch.txt
    deps: [work/stage.py]
    params: [fetch_base]
    outs: [fetch.txt]
  read:
    cmd: python work/stage.py read {seconds} read.txt data/in.txt
    deps: [work/stage.py, data]
    params: [task, collect, check_bias]
    outs: [read.txt]
  train:
    cmd: python work/stage.py train 0 train.txt fetch.txt read.txt
    deps: [work/stage.py, fetch.txt, read.txt]
    params: [finetune]
    outs: [train.txt]
  judge:
    cmd: python work/stage.py judge 0 judge.txt train.txt
    deps: [work/stage.py, work/judge.py, train.txt]
    params: [model_card]
    outs: [judge.txt]
"""


@dataclass(frozen=True)
class Toy:
    """One such checkout."""

    root: Path
    environment: dict[str, str]

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "flows.training", *arguments],
            cwd=self.root,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def dvc(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dvc", *arguments]
        return subprocess.run(
            command, cwd=self.root, env=self.environment, text=True, capture_output=True, check=False
        )

    def start_dvc(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dvc", *arguments]
        return subprocess.Popen(command, cwd=self.root, env=self.environment, stdout=subprocess.DEVNULL)

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def change(self, path: str, old: str, new: str) -> None:
        text = (self.root / path).read_text()
        assert old in text
        self.write(path, text.replace(old, new, 1))

    def inject_fault(self, name: str, order: str) -> None:
        """Have a stage misbehave; see STAGE."""
        self.write(f"faults/{name}", order)

    def begun(self) -> list[str]:
        """The stages that have begun since `forget`, in order."""
        return [name for name, what, _ in self.log() if what == "begin"]

    def log(self) -> list[tuple[str, str, float]]:
        path = self.root / "faults" / "ran"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(name, what, float(at)) for name, what, at in (line.split() for line in lines)]

    def forget(self) -> None:
        (self.root / "faults" / "ran").unlink(missing_ok=True)

    def outputs(self) -> dict[str, Any]:
        """The bytes of each output, and what DVC locked; its file lists stages in the order they ended."""
        names = ("fetch.txt", "read.txt", "train.txt", "judge.txt")
        lock = yaml.safe_load((self.root / "dvc.lock").read_text())
        return {"dvc.lock": lock, **{name: (self.root / name).read_bytes() for name in names}}

    def wait_for(self, stage: str, timeout_s: float = 300) -> None:
        """Wait until a stage has begun."""
        deadline = time.monotonic() + timeout_s
        while stage not in self.begun():
            assert time.monotonic() < deadline, f"{stage} did not begin in {timeout_s} s"
            time.sleep(0.05)

    def processes(self) -> list[psutil.Process]:
        """Everything that works in this checkout."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.cwd() == str(self.root) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def stage_processes(self) -> list[psutil.Process]:
        """The stages at work, without DVC."""
        return [one for one in self.processes() if "work/stage.py" in " ".join(one.cmdline())]


def make_toy(root: Path, environment: dict[str, str], seconds: float = 0.0) -> Toy:
    """Make a checkout with four stages: fetch and read stand side by side, then train, then judge."""
    toy = Toy(root, environment)
    toy.write("work/stage.py", STAGE)
    toy.write("work/judge.py", "# a module of judge alone\n")
    toy.write("data/in.txt", "rows\n")
    toy.write("dvc.yaml", GRAPH.format(seconds=seconds))
    toy.write("params.yaml", (ROOT / "params.yaml").read_text())
    toy.write("faults/.keep", "")
    toy.write(".gitignore", "/faults/\n/.perennial/\n/fetch.txt\n/read.txt\n/train.txt\n/judge.txt\n")
    subprocess.run(["git", "init", "-q", "."], cwd=root, check=True)
    assert toy.dvc("init", "-q").returncode == 0
    toy.write(".dvc/config", "[core]\n    analytics = false\n")
    return toy


def kill(process: subprocess.Popen[str], number: signal.Signals = signal.SIGKILL) -> None:
    os.kill(process.pid, number)


class Api:
    """What Prefect has recorded."""

    def __init__(self, url: str, auth_string: str) -> None:
        self.url = url
        self.auth_string = auth_string
        user, _, password = auth_string.partition(":")
        self.auth = user, password
        self.client = httpx.Client(auth=self.auth, timeout=30)
        self.environment = {"PREFECT_API_URL": url, "PREFECT_API_AUTH_STRING": auth_string}

    def rows(self, kind: str, **body: Any) -> list[dict[str, Any]]:
        answer = self.client.post(f"{self.url}/{kind}/filter", json=body)
        answer.raise_for_status()
        return answer.json()

    def automations(self) -> list[dict[str, Any]]:
        answer = self.client.post(f"{self.url}/automations/filter", json={})
        answer.raise_for_status()
        return answer.json()

    def last_run(self) -> dict[str, Any]:
        return self.rows("flow_runs", sort="START_TIME_DESC", limit=1)[0]

    def task_states(self, flow_run: dict[str, Any]) -> dict[str, str]:
        """State by task, once the server has recorded all of them."""
        wanted = {"flow_runs": {"id": {"any_": [flow_run["id"]]}}}
        return {row["name"]: row["state_name"] for row in self.rows("task_runs", **wanted)}

    def log_lines(self, flow_run: dict[str, Any]) -> dict[str, list[str]]:
        """Log lines by task; those of the flow itself under the empty name."""
        wanted = {"flow_runs": {"id": {"any_": [flow_run["id"]]}}}
        names = {row["id"]: row["name"] for row in self.rows("task_runs", **wanted)}
        lines: dict[str, list[str]] = {}
        for row in self.rows("logs", logs={"flow_run_id": {"any_": [flow_run["id"]]}}, limit=200):
            lines.setdefault(names.get(row["task_run_id"], ""), []).append(row["message"])
        return lines

    def artifacts(self, flow_run: dict[str, Any]) -> dict[str, dict[str, Any]]:
        wanted = {"artifacts": {"flow_run_id": {"any_": [flow_run["id"]]}}}
        return {row["key"]: row for row in self.rows("artifacts", **wanted)}
