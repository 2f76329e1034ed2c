import logging
import threading
import time
from pathlib import Path

import yaml

from flows.training.all_cores import AllCores, estimate_lines
from stages.common.artifacts import write_json

ROOT = Path(__file__).parents[3]
logger = logging.getLogger("test")


def test_one_stage_at_a_time_has_the_cores(tmp_path):
    cores, inside, most = AllCores(tmp_path, ()), [], []

    def work():
        with cores.hold(logger):
            inside.append(1)
            time.sleep(0.02)
            most.append(len(inside))
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]


def test_the_estimate_of_the_stages_that_run_is_logged_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    side = {"rows": 9, "tokens": 180, "learned_tokens": 36, "longest": 20, "longest_answer": 4}
    sides = dict.fromkeys(("train", "validation", "test"), side)
    counted = {"success": True, "problems": [], "sides": sides, "answered_by": "paged"}
    write_json(tmp_path / "reports/preflight/metrics.json", counted)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    cores = AllCores(tmp_path, ["finetune", "evaluate"])
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            with cores.hold(logger):
                pass
    lines = [record.message for record in caplog.records]
    assert len(lines) == 6
    assert lines[0].startswith("this machine: ") and "finetune: 9 rows" in lines[2]
    assert "memory: " in lines[4] and "costs: " in lines[5]


def test_without_rows_there_is_no_estimate(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    assert estimate_lines(tmp_path, ["finetune"]) == []


def test_an_estimate_that_fails_gives_its_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    write_json(tmp_path / "reports/preflight/metrics.json", {"success": False, "problems": ["too long"]})
    lines = estimate_lines(tmp_path, ["finetune"])
    assert lines == ["no estimate of the time: error: preflight counted no tokens: too long"]
