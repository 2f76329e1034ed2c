"""The benchmarks of training: the contestants with a tiny model, the choice of settings, the tables."""

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from benchmarks import method_costs, training
from benchmarks.training_peers import IGNORED, label
from stages.common.chat.template import Encoded
from stages.common.params.finetune import Method

ROOT = Path(__file__).resolve().parents[2]


def run(module, tmp_path, *arguments):
    command = [sys.executable, "-m", f"benchmarks.{module}", "--tiny", "--out", str(tmp_path / "out.json")]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((tmp_path / "out.json").read_text()), done.stdout


@pytest.mark.slow
def test_ours_and_trl_train_the_same_rows_to_the_same_loss(tmp_path):
    found, table = run("training", tmp_path, "--repeats", "1", "--dtypes", "float32")
    reached = found["dtypes"]["float32"]
    assert not reached["failed"], reached["failed"]
    assert set(reached["runs"]) == {"ours", "trl defaults", "trl sdpa", "trl eager", "trl packing"}
    assert len({runs[0]["tokens"] for runs in reached["runs"].values()}) == 1
    assert reached["loss"]["trl sdpa"] == pytest.approx(reached["loss"]["ours"], rel=0.01)
    assert 0 < reached["product_share"] < 1
    assert found["LLaMA-Factory"].startswith("not measured")
    assert "tokens/s against trl's defaults" in table


@pytest.mark.slow
def test_each_method_is_trained_on_the_same_rows_and_has_a_line(tmp_path):
    names = ("lora", "partial", "prompt_tuning")
    found, table = run("method_costs", tmp_path, "--validation-rows", "4", "--methods", *names)
    lora, partial, tokens = (found["methods"][name] for name in names)
    assert lora["train_tokens"] == partial["train_tokens"] > 0
    assert lora["processor_seconds"] > 0
    assert tokens["adapter_bytes"] < lora["adapter_bytes"] < partial["adapter_bytes"]
    assert "exact_match" in lora["metrics"] and "| `partial` | 5e-05 |" in table


def test_rates_are_those_of_the_how_to_unless_they_are_given():
    finetune = {"learning_rate": 0.004, "rank": 16}
    needing_more = {"head", "distill", "grpo", "dpo", "kto", "orpo"}
    assert set(method_costs.list_methods()) == set(get_args(Method)) - needing_more
    assert method_costs.choose_rate("lora", finetune) == 0.004
    assert method_costs.choose_rate("rslora", finetune) == 0.001
    assert method_costs.choose_rate("full", finetune) == 0.00005
    assert method_costs.choose_rate("prefix_tuning", finetune) == 0.03
    assert method_costs.read_rates(["full=0.1"], ["full"]) == {"full": 0.1}
    with pytest.raises(ValueError, match="--rate none=1: the methods are full"):
        method_costs.read_rates(["none=1"], ["full"])


def test_a_method_that_fails_has_a_line_with_its_reason():
    assert "| `dora` | – | – | – | – | – | – | – | no such module | – |" in method_costs.format_table(
        {"dora": {"failed": "no such module"}}
    )


def figures(speed, loss):
    return {"tokens_per_second": speed, "loss": loss, "product_share": 0.5, "peak_rss_mib": 100}


def test_the_best_settings_of_a_peer_are_the_fastest_of_those_with_our_loss():
    runs = {
        "ours": [figures(1000, 0.500)],
        "trl defaults": [figures(100, 0.9)],
        "trl sdpa": [figures(300, 0.502)],
        "trl eager": [figures(350, 0.498)],
        "trl packing": [figures(900, 0.7)],
    }
    peers = {"trl": ["trl sdpa", "trl eager", "trl packing"], "LLaMA-Factory": []}
    assert training.choose_best(runs, peers["trl"]) == "trl eager"
    assert training.choose_best(runs, ["trl packing"]) == "trl packing"  # there is no other
    assert training.choose_best(runs, []) is None
    found = training.summarize("bfloat16", runs, peers)
    assert found["best"] == {"trl": "trl eager"}
    goals = {goal["what"]: (goal["value"], goal["reached"]) for goal in found["goals"]}
    assert goals == {
        "share of matrix products, bfloat16": (0.5, True),
        "tokens/s against trl's defaults": (10.0, True),
        "tokens/s against the best of trl (trl eager)": (2.857, True),
    }
    table = training.format_table({"bfloat16": {**found, "runs": runs, "failed": {"x": "broken"}}})
    assert "| bfloat16, trl eager | 350 (350) | 2.86 | 0.4980 | 100 |" in table
    assert "| bfloat16, x | – | – | – | broken |" in table


def test_only_what_is_learned_has_a_label():
    row = Encoded([5, 6, 7, 8, 9, 1], 2, given=((3, 4),))
    assert label(row) == [IGNORED, IGNORED, 7, IGNORED, 9, 1]
