"""The benchmark for a GPU, whole and tiny on a CPU, and its table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import Part, list_parts, run
from benchmarks.gpu.report import format_report, list_goals

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_script_runs_through_on_a_cpu_with_tiny_models(tmp_path):
    done = subprocess.run(
        [str(ROOT / "benchmarks" / "gpu.sh"), "--tiny", "--out", str(tmp_path)],
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert set(found) == {part.name for part in list_parts()}
    assert {name: one["status"] for name, one in found.items()} == dict.fromkeys(found, "measured"), found
    for model in ("llama-8b", "qwen3-4b"):
        ours, trl = (found[f"train {model} {who}"]["result"] for who in ("ours", "trl"))
        assert ours["tokens"] == trl["tokens"] > 0
        assert ours["train_loss"] == pytest.approx(6.2, abs=0.3)  # log 512, and trl's is of the same tokens
        assert trl["train_loss"] == pytest.approx(6.2, abs=0.3)
    served = found["serve"]["result"]
    assert served["swap"]["failed"] == 0 and served["swap"]["swapped"]
    assert len(served["two_versions"]["answers_by_version"]) == 2
    assert served["engine"] == "vllm" or "vLLM is not installed" in served["bare"]
    assert found["task"]["result"]["train_loss"] > 0
    table = (tmp_path / "gpu.md").read_text()
    assert "| llama-8b ours |" in table and "tiny models: the figures say nothing" in table


def test_a_part_that_fails_or_cannot_run_or_takes_too_long_is_recorded_with_its_reason(tmp_path):
    unknown = Part("broken", "x", "training", ("--model", "none", "--who", "ours"))
    found = run(unknown, sys.executable, tmp_path, False, 60.0)
    assert found["status"] == "failed" and "invalid choice: 'none'" in found["reason"]
    found = run(Part("gpu", "x", "numerics"), sys.executable, tmp_path, False, 60.0)
    assert found["status"] == "skipped" and "torch finds no GPU" in found["reason"]
    found = run(Part("slow", "x", "numerics", limit_s=0.01), sys.executable, tmp_path, False, 60.0)
    assert found["status"] == "failed" and "not done after 0 s" in found["reason"]
    found = run(Part("late", "x", "numerics"), sys.executable, tmp_path, False, 5.0)
    assert found == {"status": "skipped", "seconds": 0.0, "reason": "5 s were left of the whole time"}


def test_goals_are_those_of_the_faster_of_each_side_and_the_table_names_what_is_missing():
    def trained(speed, mfu=None):
        result = {"tokens_per_second": speed, "mfu": mfu, "product_share": 0.5, "peak_memory_mib": 9}
        return {
            "status": "measured",
            "seconds": 1.0,
            "result": {**result, "gradient_checkpointing": False, "seconds": 2.0},
        }

    results = {
        "train llama-8b ours": trained(12_000.0, 0.4),
        "train llama-8b ours-compiled": trained(13_000.0, 0.46),
        "train llama-8b trl": trained(9_000.0),
        "train llama-8b trl-checkpointing": trained(11_000.0),
        "train qwen3-4b ours": trained(20_000.0, 0.3),
        "serve": {"status": "skipped", "seconds": 0.1, "reason": "no | vLLM"},
    }
    goals = {goal["what"]: (goal["value"], goal["reached"]) for goal in list_goals(results)}
    assert goals == {
        "MFU, llama-8b": (0.46, True),
        "tokens/s against trl, llama-8b": (1.18, False),
        "MFU, qwen3-4b": (0.3, False),
    }
    about = dict.fromkeys(("gpu", "cores", "processor", "memory_gib", "torch", "python", "date"), "x")
    table = format_report({**about, "tiny": False}, results)
    assert "| serve | skipped | 0.1 | no / vLLM |" in table
    assert "| tokens/s against trl, llama-8b | 1.18 | ≥ 1.3 | **no** |" in table
