"""The gate with a champion of another method than the candidate's, both on one private server."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from flows.gate.evaluation import keep_test_rows
from flows.gate.verdict import read_verdict
from services.versions.aliases import ALIASES, Aliases, write_aliases
from stages import ask_base
from stages.common.artifacts import read_json, write_text
from stages.common.model.adapter import PROMPT_METHODS
from stages.evaluate import __main__ as evaluate
from stages.export import __main__ as export
from stages.finetune import __main__ as finetune
from stages.preflight import __main__ as preflight
from tests.services.serving import ROOT
from tests.stages.families import write_project
from tests.stages.test_families import numbered

RATES = {"lora": 0.003, "full": 0.001, "prompt_tuning": 0.1, "prefix_tuning": 0.1}


def make_version(method):
    """Train a tiny model with a method, judge it and store it; return its tag and its trainer's answers."""
    settings = {"finetune__method": method, "finetune__learning_rate": RATES[method]}
    has_gguf = method not in PROMPT_METHODS
    write_project("llama", numbered("llama"), ask_base__dtype="float32", export__gguf=has_gguf, **settings)
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["flows"]["retrain"]["gate"] |= {"min_new_rows": 5, "resamples": 100}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    for stage in (preflight, ask_base, finetune, export, evaluate):
        stage.main()
    keep_test_rows(Path())
    run("services.versions", "add")
    name, version = params["model_card"]["name"], read_json(Path("artifacts/export/serving.json"))["version"]
    table = pq.read_table("artifacts/evaluate/predictions.parquet").to_pydict()
    return f"{name}:{version}", dict(zip(table["id"], table["tuned"], strict=True))


def run(module, *arguments):
    """Run a module in a process of its own, as BentoML keeps the store that a process used first."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done


def count_shared(answers, others):
    """Return how many characters the answers to the same rows have in common from their beginning."""
    pairs = [zip(text, others[row], strict=False) for row, text in answers.items()]
    return sum(1 for pair in pairs for _ in takewhile(lambda both: both[0] == both[1], pair))


@pytest.mark.slow
@pytest.mark.parametrize(("former", "newer"), [("full", "prompt_tuning"), ("prefix_tuning", "lora")])
def test_candidate_and_champion_of_other_methods_each_answer_as_they_were_judged(
    tmp_path, monkeypatch, former, newer
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    champion, before = make_version(former)
    write_aliases(ALIASES, Aliases(champion))
    candidate, after = make_version(newer)
    held = [numbered("llama")(n) for n in range(300, 308)]
    lines = "".join(json.dumps({**asdict(one), "tags": dict(one.tags)}) + "\n" for one in held)
    write_text(Path(".perennial/holdout/rows.jsonl"), lines)

    done = run("flows.gate", candidate)
    assert Path(".perennial/gate").exists(), done.stderr
    verdict = read_verdict(Path(), candidate)
    assert (verdict.mode, verdict.champion) == ("champion", champion)
    judged = {criterion.name: criterion for criterion in verdict.criteria}
    assert {"new_window", "old_test", "parity"} <= judged.keys()
    assert judged["parity"].passed, judged["parity"].summary
    kept = read_json(Path(f".perennial/gate/{candidate.split(':')[1]}/answers.json"))
    assert len(kept["new"]) == 8 and len(kept["old"]) == 8
    # An engine computes in the machine's number format: a random model's answers may end otherwise.
    for side, own, others in (("champion", before, after), ("candidate", after, before)):
        answers = {row: pair[side] for row, pair in kept["old"].items()}
        assert count_shared(answers, own) > 3 * count_shared(answers, others)
