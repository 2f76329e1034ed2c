"""Prompting in place of training: prompts, and all ways with a tiny base model."""

from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from benchmarks import prompting
from monitoring.traffic.embeddings import embed
from services.engines.paged.engine import PagedEngine
from stages.common.artifacts import write_json
from stages.common.errors import InputError
from stages.common.messages import Message
from stages.common.model.loading import load_tokenizer
from stages.common.records import make_row, write_rows
from stages.common.task.kinds import make_task
from tests.tiny import save_model

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("blue", "green")


def make_question(number, system=None):
    """Return a row that asks for one of two labels."""
    turns = [Message("user", f"is it {WORDS[number % 2]} {number}"), Message("assistant", WORDS[number % 2])]
    head = [Message("system", system)] if system else []
    return make_row([*head, *turns], "toy", "mit", group=str(number))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder in which the pipeline has run: the base model was always wrong, the tuned one always right."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prompting, "PagedEngine", partial(PagedEngine, kv_cache_mib=4))
    monkeypatch.setattr(prompting, "embed", lambda texts, _: embed(texts, "ngrams"))
    save_model(Path("artifacts/fetch_base"))
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["evaluate"]["resamples"] = 100
    Path("params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    write_json(Path("artifacts/curate/task.json"), {"kind": "label", "labels": list(WORDS)})
    write_json(Path("reports/ask_base/metrics.json"), {"answer_limit_tokens": 8})
    write_rows(Path("artifacts/split/train.parquet"), [make_question(number) for number in range(20)])
    test = [make_question(number) for number in range(100, 112)]
    write_rows(Path("artifacts/split/test.parquet"), test)

    def judge():
        rows = [{"id": row.id, "base": "red", "tuned": row.answer} for row in test]
        Path("artifacts/evaluate").mkdir()
        pq.write_table(pa.Table.from_pylist(rows), "artifacts/evaluate/predictions.parquet")

    return judge


def test_all_ways_are_asked_with_the_same_rows_and_the_best_is_compared_with_the_tuned_model(
    project, monkeypatch
):
    given = {}
    ask_in_all_ways = prompting.ask_in_all_ways

    def record(*arguments):
        for name, answers, length in ask_in_all_ways(*arguments):
            given[name] = answers
            yield name, answers, length

    project()
    monkeypatch.setattr(prompting, "ask_in_all_ways", record)
    found = prompting.compare_ways(8)
    assert found["rows"] == 8 and (found["task"], found["metric"]) == ("label", "accuracy")
    assert [*found["ways"]] == ["as trained", "instructed", "4 examples", "8 examples"]
    assert {answer for answers in given.values() for answer in answers} <= set(WORDS)
    assert {len(answers) for answers in given.values()} == {8}
    assert found["ways"]["as trained"]["value"] == 0.0 and found["tuned"]["value"] == 1.0
    best = found["ways"][found["best"]]["value"]
    assert best == max(way["value"] for way in found["ways"].values())
    assert found["difference"]["value"] == pytest.approx(1.0 - best)
    lengths = found["prompt_tokens"]
    assert lengths["instructed"] < lengths["4 examples"] < lengths["8 examples"]


def test_a_checkout_in_which_nothing_was_judged_is_refused(project):
    with pytest.raises(InputError, match="run the pipeline first"):
        prompting.compare_ways(8)


def test_a_prompt_has_one_system_message_the_examples_and_then_the_question():
    row, example = make_question(1, system="Be brief."), make_question(2, system="Be long.")
    turns = prompting.write_prompt(row, "Answer with a label.", [example])
    assert [(turn.role, turn.content) for turn in turns] == [
        ("system", "Be brief.\n\nAnswer with a label."),
        ("user", "is it blue 2"), ("assistant", "blue"), ("user", "is it green 1"),
    ]  # fmt: skip


def test_the_least_similar_examples_are_left_out_of_a_prompt_that_is_too_long(tmp_path, monkeypatch):
    tokenizer = load_tokenizer(save_model(tmp_path))
    row, examples = make_question(1), [make_question(number) for number in (2, 4, 6)]

    def encode(count):
        return prompting.encode_prompt(
            tokenizer, prompting.write_prompt(row, "", examples[len(examples) - count :]), row.tools
        )

    monkeypatch.setattr(prompting, "PROMPT_TOKENS", len(encode(2)))
    assert prompting.encode_fitting_prompt(tokenizer, row, "", examples) == encode(2)
    monkeypatch.setattr(prompting, "PROMPT_TOKENS", 1)
    assert prompting.encode_fitting_prompt(tokenizer, row, "", examples) == encode(0)


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ({"kind": "label", "labels": WORDS}, "one of these labels and nothing else:\nblue; green"),
        ({"kind": "json", "label_key": None}, 'fits this JSON schema: {"'),
        ({"kind": "tools"}, "Call the functions"),
        ({"kind": "text"}, "Answer with the result alone"),
    ],
)
def test_each_kind_of_task_is_told_in_words(task, told):
    assert told in prompting.describe_task(make_task(task), ['{"n": 1}'] * 3)
