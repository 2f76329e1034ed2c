"""The benchmark for a GPU, whole and tiny on a CPU, and its table."""

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from benchmarks.gpu import __main__ as benchmark
from benchmarks.gpu.__main__ import Part, list_parts, run, share_time
from benchmarks.gpu.processes import Running, start
from benchmarks.gpu.report import format_report, list_goals
from benchmarks.gpu.task import lay_out, list_stages, summarise
from benchmarks.gpu.training import TRL, Steps

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
        ours, trl = (found[f"train {model} {who}"]["result"]["tried"] for who in ("ours", "trl"))
        assert set(trl) == set(TRL)
        assert trl["packing, flex"] == {"reason": "flex_attention has no backward pass on a CPU"}
        assert trl["packing, flash"] == {"reason": "flash_attn is not installed here"}
        # The logarithm of 512, and trl's are of the same tokens.
        for one in (ours["ours"], trl["packing, one bin at a time"], trl["rows of like length"]):
            assert one["train_loss"] == pytest.approx(6.2, abs=0.3)
            assert one["tokens"] == ours["ours"]["tokens"] > 0
    served = found["serve"]["result"]
    assert served["swap"]["failed"] == 0 and served["swap"]["swapped"]
    assert len(served["two_versions"]["answers_by_version"]) == 2
    assert served["engine"] == "vllm" or "vLLM is not installed" in served["bare"]
    task = found["task"]["result"]
    assert task["train_loss"] > 0 and task["exact_match"] == 0.0
    assert list(task["seconds"]) == sorted(list_stages()) and task["not_run"] == []
    table = (tmp_path / "gpu.md").read_text()
    # On a GPU rows are packed; here they are one sequence with a shared prefix.
    assert "| llama-8b ours, ours | perennial_shared_prefix |" in table
    assert "tiny models: the figures say nothing" in table


def test_the_script_writes_both_files_where_the_modules_are_missing_and_cannot_be_installed(tmp_path):
    python = tmp_path / "python"
    told = 'case "$2" in import*) echo "No module named \\"x|y\\"" >&2; exit 1;; esac'
    python.write_text(f'#!/bin/bash\n{told}\n[ "$1" = -c ] && exit 0\necho "no ensurepip" >&2; exit 3\n')
    python.chmod(0o755)
    done = subprocess.run(
        [str(ROOT / "benchmarks" / "gpu.sh"), "--tiny", "--out", str(tmp_path / "out")],
        env={**os.environ, "PYTHON": str(python)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())["parts"]["all"]
    assert found["status"] == "failed"
    assert "No module named x/y; the installation failed: no ensurepip" in found["reason"]
    assert "| all | failed | 0.0 | " in (tmp_path / "out" / "gpu.md").read_text()


def test_the_planned_parts_fit_ten_minutes_and_a_part_may_use_what_earlier_ones_left():
    parts = list_parts()
    assert sum(part.limit_s for part in parts if not part.extra) < 600
    assert [part.extra for part in parts] == sorted(part.extra for part in parts)
    first, second = Part("a", "x", "numerics", limit_s=100.0), Part("b", "x", "numerics", limit_s=50.0)
    extra = Part("c", "x", "numerics", limit_s=60.0, extra=True)
    assert share_time(first, [second, extra], 160.0) == 110.0
    assert share_time(second, [extra], 160.0) == 160.0
    assert share_time(first, [second, extra], 120.0) == 100.0
    assert share_time(first, [second], 90.0) == 90.0
    assert share_time(extra, [], 160.0) == 60.0


def test_the_stages_of_the_default_task_are_those_of_the_graph_up_to_the_last_that_needs_no_lock():
    graph = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert list_stages() == [*graph][: len(list_stages())]
    assert list_stages()[-1] == "evaluate"
    assert [*graph][len(list_stages()) :] == ["model_card"]


def test_a_kept_folder_can_be_used_again_and_gives_no_result_of_stages_that_did_not_run(tmp_path):
    report = tmp_path / "reports" / "evaluate" / "metrics.json"
    for _ in range(2):
        lay_out(tmp_path, tiny=False)
    report.parent.mkdir(parents=True)
    report.write_text(json.dumps({"tuned": {"exact_match": {"value": 1.0}}}))
    found = summarise(tmp_path, ["collect", "evaluate"], {"collect": 90.0})
    assert found["exact_match"] is None and found["not_run"] == ["evaluate"] and found["minutes"] == 1.5
    judged = summarise(tmp_path, ["collect", "evaluate"], {"collect": 90.0, "evaluate": 30.0})
    assert judged["exact_match"] == 1.0 and judged["not_run"] == [] and judged["minutes"] == 2.0


def test_the_first_updates_do_not_count_for_the_speed():
    steps = Steps([10, 20, 30, 40], [1, 2, 3, 4], [100.0, 101.0, 103.0, 106.0])
    assert steps.read_steady() == (70, 7, 5.0)
    with pytest.raises(RuntimeError, match="2 updates of 2 batches"):
        Steps([10, 20], [1, 2], [100.0, 101.0]).read_steady()


def test_a_part_that_fails_or_cannot_run_or_takes_too_long_is_recorded_with_its_reason(tmp_path, monkeypatch):
    unknown = Part("broken", "x", "training", ("--model", "none", "--who", "ours"), 60.0)
    found = run(unknown, sys.executable, tmp_path, False, 60.0)
    assert found["status"] == "failed" and "invalid choice: 'none'" in found["reason"]
    found = run(Part("gpu", "x", "numerics", limit_s=60.0), sys.executable, tmp_path, False, 60.0)
    assert found["status"] == "skipped" and "torch finds no GPU" in found["reason"]
    late = Part("late", "x", "numerics", limit_s=60.0)
    found = run(late, sys.executable, tmp_path, False, 5.0)
    assert found == {"status": "skipped", "seconds": 0.0, "reason": "5 s were left of the whole time"}
    monkeypatch.setattr(benchmark, "LEAST_S", 0.0)
    found = run(late, sys.executable, tmp_path, False, 0.01)
    assert found == {"status": "failed", "seconds": found["seconds"], "reason": "ended after 0 s"}


@pytest.mark.parametrize(("end", "status"), [("time.sleep(60)", "cut"), ("raise ValueError('no')", "failed")])
def test_what_a_part_had_measured_when_it_was_ended_or_failed_is_kept_and_in_the_table(
    tmp_path, monkeypatch, end, status
):
    package = tmp_path / "benchmarks" / "gpu"
    package.mkdir(parents=True)
    (tmp_path / "benchmarks" / "__init__.py").touch()
    for name in ("part", "__init__"):
        (package / f"{name}.py").write_text((ROOT / "benchmarks" / "gpu" / f"{name}.py").read_text())
    figures = {"minutes": 1.5, "exact_match": None, "not_run": ["evaluate"], "seconds": {"collect": 90.0}}
    (package / "half.py").write_text(
        "import time\nfrom benchmarks.gpu.part import run_part\n"
        f"def measure(options, note):\n    note({figures!r})\n    {end}\nrun_part('', measure)\n"
    )

    def begin(module, arguments, log, python):
        running = start(module, arguments, log, python)

        def wait(seconds):
            while not (tmp_path / "parts" / "task.json").exists():
                time.sleep(0.05)
            return running.wait(0.0 if status == "cut" else seconds)

        return Running(running.pid, wait)

    monkeypatch.setattr(benchmark, "start", begin)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    found = run(Part("task", "x", "half", limit_s=60.0), sys.executable, tmp_path, False, 60.0)
    assert found["status"] == status and found["result"] == figures
    assert {"cut": "ended after 60 s, with what it had", "failed": "no"}[status] in found["reason"]
    about = dict.fromkeys(("gpu", "cores", "processor", "memory_gib", "torch", "python", "date"), "x")
    table = format_report({**about, "tiny": False}, {"task": found})
    assert "The default task: 1.5 minutes; without evaluate." in table
    assert f"| task | {status} |" in table


def test_goals_are_of_what_the_pipeline_runs_against_trls_best_and_the_table_names_what_is_missing():
    def trained(mfu=None, **speeds):
        def figures(speed):
            return {
                "tokens_per_second": speed, "mfu": mfu, "product_share": 0.5, "peak_memory_mib": 9,
                "gradient_checkpointing": False, "attention": "sdpa", "seconds": 2.0,
            }  # fmt: skip

        tried = {
            name: figures(speed) if speed else {"reason": "no | flash"} for name, speed in speeds.items()
        }
        return {"status": "measured", "seconds": 1.0, "result": {"tried": tried}}

    results = {
        "train llama-8b ours": trained(0.46, ours=12_000.0),
        "train llama-8b ours-compiled": trained(0.5, compiled=13_000.0),
        "train llama-8b trl": trained(flex=11_000.0, packing=9_000.0, flash=None),
        "train qwen3-4b ours": trained(0.3, ours=20_000.0),
        "train qwen3-4b trl": trained(flash=None),
        "serve": {
            "status": "cut", "seconds": 9.0, "reason": "ended",
            "result": {"engine": "vllm", "bare": "vllm ended with 1", "throughput": {
                "8": {"ours": {"tokens_per_second": 950.0, "first_text_s": 0.1}}}},
        },
        "memory": {"status": "skipped", "seconds": 0.1, "reason": "no | vLLM"},
    }  # fmt: skip
    goals = {goal["what"]: (goal["value"], goal["reached"]) for goal in list_goals(results)}
    assert goals == {
        "MFU, llama-8b": (0.46, True),
        "tokens/s against trl, llama-8b": (1.09, False),
        "MFU, qwen3-4b": (0.3, False),
    }
    about = dict.fromkeys(("gpu", "cores", "processor", "memory_gib", "torch", "python", "date"), "x")
    table = format_report({**about, "tiny": False}, results)
    assert "| memory | skipped | 0.1 | no / vLLM |" in table
    assert "| tokens/s against trl, llama-8b | 1.09 | ≥ 1.3 | **no** |" in table
    assert "| llama-8b trl, flex | sdpa | 11,000 |" in table
    assert "| llama-8b trl, flash | no / flash |" in table
    assert "| 8 | 950 | – | – | 0.1 | – |" in table
    assert "Bare vLLM: vllm ended with 1." in table
    assert "A change of version under load: not measured." in table


def test_the_bare_server_gets_the_settings_that_the_service_gives_its_engine(tmp_path):
    from benchmarks.gpu.serving import vllm_command

    text = (ROOT / "params.yaml").read_text()
    changes = {"context_tokens: 2048 #": "context_tokens: 768 #", "max_running: 32 #": "max_running: 24 #"}
    for old, new in {**changes, "gpu_memory: 0.9 #": "gpu_memory: 0.37 #"}.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "params.yaml").write_text(text)
    adapter = tmp_path / "artifacts" / "finetune"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 100}))
    command = vllm_command(tmp_path, 1234)
    given = dict(pairwise(command))
    wanted = {
        "--max-model-len": "768", "--max-num-seqs": "24", "--gpu-memory-utilization": "0.37",
        "--max-lora-rank": "128", "--max-loras": "3",
    }  # fmt: skip
    assert {name: given[name] for name in wanted} == wanted
