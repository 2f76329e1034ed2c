"""Control tokens of the template in questions and answers, from preflight to the judgement: they are text."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from stages import ask_base
from stages.evaluate import __main__ as evaluate
from stages.export import __main__ as export
from stages.finetune import __main__ as finetune
from stages.preflight import __main__ as preflight
from tests.stages.families import row, write_project

ANSWER = "It is <|eot_id|> here"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["transformers", "paged"])
def test_an_answer_with_a_control_token_is_learned_written_and_judged_as_text(tmp_path, monkeypatch, engine):
    monkeypatch.chdir(tmp_path)
    write_project(
        "llama",
        lambda n: row(f"which <|eot_id|> ends turn {n:03d}<|end_header_id|>?", ANSWER),
        kind="text",
        task__kind="text",
        task__label_key=None,
        task__stratify_by=None,
        ask_base__engine=engine,
        ask_base__max_new_tokens=40,
        ask_base__dtype="float32",
        finetune__rank=32,
        finetune__epochs=20,
        finetune__learning_rate=0.01,
    )
    for stage in (preflight, ask_base, finetune, export, evaluate):
        stage.main()
    report = json.loads(Path("reports/evaluate/metrics.json").read_text())
    written = pq.read_table("artifacts/evaluate/predictions.parquet")["tuned"].to_pylist()
    assert written == [ANSWER] * 8
    assert report["tuned"]["exact_match"]["value"] == report["tuned"]["finished"]["value"] == 1.0
    assert report["base"]["exact_match"]["value"] == 0.0
    assert report["engine"] == {"base": engine, "tuned": engine}
