"""Rejected answers and ratings through the split: pairs stay with their prompt, and nothing leaks."""

import json
from pathlib import Path

import pytest
import yaml

from stages.common.artifacts import write_json
from stages.common.chat.turns import unroll
from stages.common.messages import Message
from stages.common.records import make_row, read_rows, write_rows
from stages.common.task.json_task import JsonTask
from stages.common.task.kinds import TASK_FILE
from stages.split.__main__ import main

ROOT = Path(__file__).parents[3]
WORDS = ("amber", "basalt", "cedar", "dune", "ember", "fjord", "grove", "heath", "islet", "jetty", "knoll")


def row(number, answer='{"intent":"On"}', worse=None, **more):
    question = " ".join(WORDS[(number * step + step) % len(WORDS)] for step in (1, 2, 4, 7)) + f" {number:05}"
    rejected = Message("assistant", worse) if worse else None
    return make_row(
        [Message("user", question), Message("assistant", answer)], "toy", "mit", rejected=rejected, **more
    )


@pytest.fixture
def split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["split"] |= {
        "max_train_rows_per_group": None,
        "validation_fraction": 0.2,
        "near_duplicate_threshold": 0.99,
        "min_train_rows": 5,
        "min_test_rows": 3,
    }
    params["task"]["stratify_by"] = None
    Path("params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    write_json(TASK_FILE, JsonTask(None).describe())

    def run(rows, refused=()):
        write_rows(Path("artifacts/curate/rows.parquet"), rows)
        write_rows(Path("artifacts/curate/refused.parquet"), refused)
        main()
        names = ("train", "validation", "test", "refused")
        return {name: read_rows(Path(f"artifacts/split/{name}.parquet")) for name in names}

    return run


def test_the_pairs_of_one_prompt_stay_on_one_side(split):
    rows = [row(n, worse=worse, group=f"prompt {n}") for n in range(40) for worse in ("no", "never")]
    sides = split(rows)
    groups = {name: {one.group for one in sides[name]} for name in ("train", "validation", "test")}
    assert not groups["train"] & groups["test"] and not groups["train"] & groups["validation"]
    assert all(one.rejected for name in groups for one in sides[name])
    report = json.loads(Path("reports/split/metrics.json").read_text())
    counted = report["rows_with_rejected_answer"]
    assert counted == {name: len(sides[name]) for name in groups}


def test_refused_answers_to_held_out_prompts_are_not_learned(split):
    rows = [row(n) for n in range(40)]
    held_out = {one.question for one in split(rows)["test"]} | {
        one.question for one in split(rows)["validation"]
    }
    refused = [row(n, '{"intent":"Off"}', is_desirable=False) for n in range(40)]
    sides = split(rows, [*refused, row(900, "no", is_desirable=False)])
    left = {one.question for one in sides["refused"]}
    assert len(left) == 41 - len(held_out) and not left & held_out
    report = json.loads(Path("reports/split/metrics.json").read_text())
    assert (report["refused_answers"], report["refused_answers_of_held_out_prompts"]) == (
        len(left),
        len(held_out),
    )
    assert all(one.is_desirable is not False for one in sides["train"])


def test_of_a_conversation_the_worse_answer_belongs_to_the_last_turn():
    turns = [Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")]
    talk = make_row(turns, "toy", "mit", rejected=Message("assistant", "e"))
    assert [one.rejected and one.rejected.content for one in unroll([talk], "all")] == [None, "e"]
