"""Preference on test pairs: what is measured is what the models' own probabilities say."""

import json
from pathlib import Path

import pytest
import torch

from services.engines.offline import ModelFolders, score_references
from stages.common.chat.preferences import encode_pairs
from stages.common.messages import Message
from stages.common.model.adapter import put_initial_adapter
from stages.common.model.generation import encode_questions
from stages.common.model.loading import load_base, load_tokenizer, load_tuned
from stages.common.model.results import Sampling, compare, with_intervals
from stages.common.records import make_row, read_rows
from stages.evaluate.preferences import PairsFound, Scorer, compute_preference, measure_preferences
from tests.stages.evaluate.test_evaluate import json_rows, models, project, run  # noqa: F401  two are fixtures
from tests.tiny import make_tokenizer

CPU = torch.device("cpu")
SAMPLING = Sampling(0.95, 500, 7)


def paired_rows(pairs=22, plain=2):
    """Return test rows, of which all but the last ones have a rejected answer, too."""
    rows = json_rows(pairs + plain)
    worse = [Message("assistant", f"it is {n}" + "!" * (n % 5)) for n in range(pairs)]
    with_worse = [
        make_row(row.messages, row.source, row.license, group=row.group, tags=row.tags, rejected=bad)
        for row, bad in zip(rows[:pairs], worse, strict=True)
    ]
    return [*with_worse, *rows[pairs:]]


def measure_by_hand(model):
    """Return how much likelier the better answer of each pair is: one plain pass for each answer."""
    tokenizer = load_tokenizer(Path("artifacts/fetch_base"))
    pairs, _ = encode_pairs(tokenizer, read_rows(Path("artifacts/split/test.parquet")))

    def read_probability(example):
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            scores = torch.log_softmax(model(ids).logits[0, :-1].double(), dim=-1)
        each = scores.gather(1, ids[0, 1:, None])[:, 0]
        return float(each[example.prompt_length - 1 :].sum())

    return [read_probability(pair.chosen) - read_probability(pair.rejected) for pair in pairs]


@pytest.fixture
def report(project):  # noqa: F811
    project(paired_rows())
    return run(Path())["preferences"]


def test_the_preference_on_test_pairs_is_that_of_the_models_own_probabilities(report):
    base, adapter = Path("artifacts/fetch_base"), Path("artifacts/finetune")
    by_hand = {
        "before": measure_by_hand(load_base(base, torch.float32, CPU)),
        "tuned": measure_by_hand(load_tuned(base, adapter, torch.float32, CPU)),
    }
    assert (report["pairs"], report["started_from"], report["left_out"]) == (22, "base", {})
    for name, gaps in by_hand.items():
        assert report[name]["accuracy"]["value"] == pytest.approx(sum(gap > 0 for gap in gaps) / 22, abs=1e-6)
        assert report[name]["margin"]["value"] == pytest.approx(sum(gaps) / 22, rel=1e-3)
        low, high = (report[name]["accuracy"][key] for key in ("low", "high"))
        assert 0 <= low <= report[name]["accuracy"]["value"] <= high <= 1 and low < high
    change = report["difference"]["accuracy"]
    assert change["value"] == pytest.approx(
        report["tuned"]["accuracy"]["value"] - report["before"]["accuracy"]["value"], abs=1e-5
    )
    assert 0 < change["p_value"] <= 1


def test_a_training_that_started_from_an_adapter_is_compared_with_it(project):  # noqa: F811
    project(paired_rows())
    put_initial_adapter(Path("artifacts/finetune"), "0123456789ab", "a" * 64)
    found = run(Path())["preferences"]
    assert found["started_from"] == "0123456789ab"
    before, tuned = found["before"], found["tuned"]
    assert before["accuracy"] == tuned["accuracy"] and found["difference"]["accuracy"]["p_value"] == 1
    assert before["margin"]["value"] == pytest.approx(tuned["margin"]["value"], rel=1e-3)


def test_too_few_pairs_are_no_measurement_and_say_so(project, caplog):  # noqa: F811
    folder = project(paired_rows(19, 5))
    assert run(folder)["preferences"] == {
        "pairs": 19,
        "left_out": {},
        "skipped": "too few test pairs: 19, and evaluate.min_preference_pairs is 20",
        "started_from": "base",
    }
    assert "preferences are not measured on the test: too few test pairs: 19" in caplog.text
    project(json_rows())
    assert run(folder)["preferences"] is None


def test_both_engines_score_a_reference_alike(project):  # noqa: F811
    project(paired_rows())
    base = Path("artifacts/fetch_base")
    tokenizer = load_tokenizer(base)
    questions = encode_questions(tokenizer, read_rows(Path("artifacts/split/test.parquet")))
    paged, plain = (
        score_references(ModelFolders(base), engine, tokenizer, questions, 8, "float32")
        for engine in ("paged", "transformers")
    )
    assert paged == pytest.approx(plain, rel=1e-4)


def test_a_model_with_a_vocabulary_of_its_own_scores_the_answers_in_its_tokens():
    rows, seen = paired_rows(), []
    whole, own = (make_tokenizer(merges) for merges in ((("t", "u"), ("i", "t")), ()))
    pairs, own_pairs = (encode_pairs(one, rows)[0] for one in (whole, own))

    def score(questions):
        seen.append([[*one.prompt, *one.reference] for one in questions])
        return [float(len(one.reference)) for one in questions]

    measure_preferences(PairsFound(pairs, {}, None), Scorer(score), Scorer(score, pairs=own_pairs), SAMPLING)
    worse, better = (
        [[getattr(pair, name).input_ids for pair in found] for found in (pairs, own_pairs)]
        for name in ("rejected", "chosen")
    )
    assert seen == [worse[0], better[0], worse[1], better[1]] and worse[0] != worse[1]


def test_a_clear_preference_has_a_small_p_value_and_equal_answers_count_half():
    before, tuned = (compute_preference(gaps) for gaps in ([0.0] * 40, [1.0] * 38 + [-1.0] * 2))
    groups = [str(n) for n in range(40)]
    found = {name: with_intervals(one, groups, SAMPLING) for name, one in (("b", before), ("t", tuned))}
    assert found["b"]["accuracy"]["value"] == 0.5 and found["t"]["accuracy"]["value"] == 0.95
    assert found["t"]["accuracy"]["low"] > 0.8 and found["t"]["margin"]["value"] == 0.9
    change = compare(before, tuned, groups, SAMPLING)["accuracy"]
    assert change["p_value"] < 0.01 and change["low"] > 0.3
    json.dumps(found)
