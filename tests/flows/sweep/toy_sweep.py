"""A checkout whose stages take no time, and whose training is worse the further its rate is from 0.001."""

import json
import math
import subprocess
from dataclasses import dataclass
from pathlib import Path

from stages.common.messages import Message
from stages.common.records import make_row, write_rows
from tests.flows.toy import ROOT, make_toy

GRAPH = """
stages:
  split:
    cmd: python work/split.py
    deps: [work/split.py, data]
    outs: [artifacts/split, artifacts/curate]
  preflight:
    cmd: python work/preflight.py
    deps: [work/preflight.py, artifacts/split]
    params: [finetune.rank]
    outs: [artifacts/preflight]
  finetune:
    cmd: python work/finetune.py
    deps: [work/finetune.py, artifacts/split/validation.parquet, artifacts/preflight]
    params: [finetune]
    outs: [artifacts/finetune]
    metrics: [reports/finetune/metrics.json]
    plots: [reports/finetune/validation.csv]
"""
SPLIT = """
import pathlib, shutil
for name, out in (("validation.parquet", "split"), ("task.json", "curate")):
    pathlib.Path(f"artifacts/{out}").mkdir(parents=True, exist_ok=True)
    shutil.copy(f"data/{name}", f"artifacts/{out}/{name}")
"""
PREFLIGHT = """
import pathlib, sys, yaml
rank = yaml.safe_load(open("params.yaml"))["finetune"]["rank"]
if rank > 100:
    sys.exit(f"error: rank {rank} does not fit into memory\\n  fix: lower finetune.rank")
pathlib.Path("artifacts/preflight").mkdir(parents=True, exist_ok=True)
pathlib.Path("artifacts/preflight/train.jsonl").write_text("rows\\n")
"""
FINETUNE = """
import json, math, os, pathlib, sys, time, yaml
section = yaml.safe_load(open("params.yaml"))["finetune"]
distance = abs(math.log10(float(section["learning_rate"]) / 0.001))
folder = pathlib.Path("reports/finetune")
folder.mkdir(parents=True, exist_ok=True)
pathlib.Path("artifacts/finetune").mkdir(parents=True, exist_ok=True)
points = []
for step in range(1, 6):
    points.append({"step": step, "loss": distance + 1 / step, "exact_match": max(0.0, 1 - distance)})
    lines = [f"{p['step']},{p['exact_match']:.6f},{p['loss']:.6f}\\n" for p in points]
    (folder / "half").write_text("step,exact_match,loss\\n" + "".join(lines))
    os.replace(folder / "half", folder / "validation.csv")
    print(f"finetune: 2 validation rows after {step} of 5 updates", file=sys.stderr, flush=True)
    time.sleep(0.2)
loss = points[-1]["loss"]
pathlib.Path("artifacts/finetune/weights").write_text(f"{section['learning_rate']} {section['rank']}")
metrics = {"validation_loss": loss, "validation_points": points, "kept_step": 5}
(folder / "metrics.json").write_text(json.dumps(metrics))
"""


@dataclass(frozen=True)
class ToySweep:
    """Such a checkout, with a commit, and everything before the training made."""

    root: Path

    def git(self, *arguments):
        identity = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "core.hooksPath=/dev/null")
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=self.root, capture_output=True, text=True, check=True).stdout


def make_toy_sweep(root, environment):
    """Make one; its space is that of the shipped params.yaml."""
    toy = make_toy(root, environment)
    for name, text in {"split": SPLIT, "preflight": PREFLIGHT, "finetune": FINETUNE}.items():
        toy.write(f"work/{name}.py", text)
    toy.write("dvc.yaml", GRAPH)
    (root / "data" / "in.txt").unlink()
    rows = [
        make_row([Message("user", f"turn on light {n}"), Message("assistant", json.dumps({"intent": "on"}))],
                 source="t", license="cc0-1.0", group=str(n), tags={}, origin="human")
        for n in range(4)
    ]  # fmt: skip
    write_rows(root / "data" / "validation.parquet", rows)
    toy.write("data/task.json", json.dumps({"kind": "json", "label_key": "intent"}))
    toy.write(".gitignore", "/faults/\n/.perennial/\n/artifacts/\n/reports/\n")
    toy.write("params.yaml", (ROOT / "params.yaml").read_text())
    found = ToySweep(root)
    found.git("add", "--all")
    found.git("commit", "-qm", "first")
    assert toy.dvc("repro", "preflight").returncode == 0
    return found


def loss_of(rate):
    """The loss of a whole training with a rate."""
    return abs(math.log10(rate / 0.001)) + 0.2
