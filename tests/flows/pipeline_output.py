"""What the pipeline leaves in a checkout, with small stand-ins for the weights; and a place for MLflow."""

import hashlib
import json
import tempfile
from functools import cache
from pathlib import Path

import yaml

from flows.registry.tracking import Registry, open_tracking
from stages.common.artifacts import write_json
from stages.common.params.loading import load_params
from stages.common.repository.dvc_lock import compute_dvc_hash

REPO = Path(__file__).resolve().parents[2]
SQLITE = "sqlite:///.perennial/mlflow.db"
NAME = "home-intents-smollm2-135m"
GRAPH = """
stages:
  finetune:
    cmd: python -c 1
    deps: [params.yaml]
    outs: [artifacts/finetune]
    metrics: [{reports/finetune/metrics.json: {cache: false}}]
  evaluate:
    cmd: python -c 1
    deps: [artifacts/finetune]
    metrics: [{reports/evaluate/metrics.json: {cache: false}}]
"""


def make_output(root, weights=b"weights", exact_match=0.86, **serving):
    """Lay out the end of a pipeline run; other weights are another version."""
    write(root / "dvc.yaml", GRAPH)
    write(root / "params.yaml", (REPO / "params.yaml").read_text())
    write(root / "artifacts/finetune/adapter_config.json", '{"r": 16}')
    write(root / "artifacts/finetune/adapter_model.safetensors", weights)
    write(root / "artifacts/finetune/trained_row_ids.txt", "0011223344556677\n")
    write_json(
        root / "artifacts/export/serving.json",
        {
            "adapter_sha256": hashlib.sha256(weights).hexdigest(),
            "base_model": "toy",
            "base_revision": "1",
            "base_sha256": "b" * 64,
            "name": NAME,
            "version": hashlib.sha256(weights).hexdigest()[:12],
            **serving,
        },
    )
    write_json(
        root / "reports/evaluate/metrics.json",
        {
            "confusions": [{"n": 4}],
            "dtype": "bfloat16",
            "tuned": {
                "exact_match": {"value": exact_match, "n": 511, "low": None},
                "valid_output": {"value": 1.0},
            },
            "slices": {"person, origin/area": {"ünï (x)": {"value": 0.5}, "": {"value": 0.25}}},
            "passed": True,
        },
    )
    write_json(root / "reports/finetune/metrics.json", {"train_loss": 0.018370554198050715, "steps": 2})
    write(root / "reports/finetune/loss.csv", "step,loss,learning_rate\n1,3.5,0.0\n2,1.25,1e-3\n")
    write(root / "reports/finetune/loss.svg", "<svg/>")
    write(root / "reports/evaluate/plots/comparison.svg", "<svg/>")
    write(root / "reports/model_card/README.md", "# card")
    lock(root)
    return root


def lock(root, **stages):
    """Write dvc.lock as it is after a run."""
    outs = [
        {"path": path, "hash": "md5", "md5": compute_dvc_hash(root / path)}
        for path in ("artifacts/finetune", "artifacts/export")
    ]
    entries = {"finetune": {"outs": outs}, **stages}
    recorded = {name: {"cmd": "python -c 1", **entry} for name, entry in entries.items()}
    write(root / "dvc.lock", yaml.safe_dump({"schema": "2.0", "stages": recorded}))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def tag_of(root):
    serving = json.loads((root / "artifacts/export/serving.json").read_text())
    return f"{serving['name']}:{serving['version']}"


def params_of(root):
    return load_params(root / "params.yaml")


def registry_of(root):
    return Registry.of(root, params_of(root))


@cache
def empty_database():
    """The bytes of a database with MLflow's tables: making them takes seconds, copying none."""
    with tempfile.TemporaryDirectory() as folder:
        open_tracking(Path(folder), SQLITE)
        return (Path(folder) / ".perennial/mlflow.db").read_bytes()


def make_recordable(root, **changes):
    """Lay out a pipeline run next to a database that has its tables."""
    write(root / ".perennial/mlflow.db", empty_database())
    return make_output(root, **changes)
