"""Training on pairs and on ratings, from the rows to the adapter and its evidence."""

import json
import logging
import math
import re
from dataclasses import replace

import pytest

from stages.common.chat.preferences import RatedAnswer
from stages.common.chat.template import Encoded
from stages.common.errors import InputError
from stages.common.messages import Message
from stages.common.model.adapter import read_settings, read_trained_ids
from stages.common.params.loading import ParamsError
from stages.common.records import make_row, read_rows, write_rows
from stages.finetune.__main__ import main
from stages.finetune.objectives.data import hold_out
from tests.stages.finetune.project import (
    adapter,
    change_finetune,
    evidence,
    make_project,
    put_own_adapter,
    rows,
)


@pytest.fixture
def pairs(tmp_path, monkeypatch, request):
    """A project for a method, whose rows have a worse answer, too."""
    monkeypatch.chdir(make_project(tmp_path, method=request.param, epochs=2))
    return tmp_path


def losses(project):
    curve = (project / "reports/finetune/loss.csv").read_text().splitlines()
    return [float(line.split(",")[1]) for line in curve[1:]]


@pytest.mark.parametrize("pairs", ["dpo", "orpo", "kto"], indirect=True)
def test_a_method_raises_the_preference_on_rows_that_it_did_not_learn(pairs):
    main()
    metrics = evidence(pairs)
    curve = losses(pairs)
    assert sum(curve[-4:]) < sum(curve[:4])
    held_out = metrics["held_out"]
    assert held_out["accuracy"] > 0.9 and held_out["margin"] > 0
    if metrics["method"] == "kto":
        assert (held_out["good"], held_out["bad"]) == (8, 8)
        assert (metrics["good_answers"], metrics["bad_answers"]) == (40, 40)
    else:
        assert held_out["pairs"] == 8
        assert held_out["likelier_after"] > held_out["likelier_before"]
    assert metrics["train_rows"] == 40
    assert metrics["rows_without_preference"] == 0
    # What comes out is an adapter like any other, and the same one each time.
    assert read_settings(pairs / "artifacts/finetune")["method"] == "lora"
    learned = {row.id for row in read_rows(pairs / "artifacts/split/train.parquet")}
    assert read_trained_ids(pairs / "artifacts/finetune") == learned
    assert not list((pairs / "checkpoints/finetune").iterdir())
    before = adapter(pairs)
    main()
    assert adapter(pairs) == before


@pytest.mark.parametrize("pairs", ["dpo"], indirect=True)
def test_an_update_starts_at_the_reference_also_from_an_adapter(pairs, caplog):
    main()
    assert "starts from the base model, which has not learned the answers" in caplog.text
    assert losses(pairs)[0] == pytest.approx(math.log(2), abs=1e-4)
    put_own_adapter(pairs)
    caplog.clear()
    main()
    assert evidence(pairs)["started_from"] == "0123456789ab"
    assert "starts from the base model" not in caplog.text
    # The reference is the adapter, not the base model: nothing has moved from it yet.
    assert losses(pairs)[0] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("pairs", ["dpo"], indirect=True)
def test_without_validation_pairs_a_share_of_the_prompts_is_measured_and_not_learned(pairs):
    split = pairs / "artifacts/split"
    write_rows(split / "validation.parquet", rows(8, 1000))
    write_rows(split / "train.parquet", [*rows(40, with_pairs=True), *rows(5, 500)])
    change_finetune(pairs, held_out_share=0.3)
    main()
    metrics = evidence(pairs)
    assert metrics["preferences"] + metrics["preferences_held_out"] == 40
    assert 4 < metrics["held_out"]["pairs"] == metrics["preferences_held_out"] < 20
    assert (metrics["train_rows"], metrics["rows_without_preference"]) == (metrics["preferences"], 5)
    assert len(read_trained_ids(pairs / "artifacts/finetune")) == metrics["preferences"]
    assert metrics["train_rows"] + metrics["rows_held_out"] + metrics["rows_without_preference"] == 45


@pytest.mark.parametrize("pairs", ["kto"], indirect=True)
def test_answers_that_people_rated_are_learned_as_good_or_bad(pairs, caplog):
    split, plain = pairs / "artifacts/split", rows(12)
    thumbs = [replace(row, tags={"feedback": "thumb"}) for row in plain[:6]]
    bad = [
        make_row([*row.messages[:-1], Message("assistant", "no")], "toy", "cc0-1.0", is_desirable=False)
        for row in rows(3, 100)
    ]
    write_rows(split / "train.parquet", [*thumbs, *plain[6:]])
    write_rows(split / "refused.parquet", bad)
    write_rows(split / "validation.parquet", rows(4, 1000))
    change_finetune(pairs, held_out_share=0.0)
    with caplog.at_level(logging.WARNING):
        main()
    metrics = evidence(pairs)
    assert (metrics["good_answers"], metrics["bad_answers"]) == (6, 3)
    assert metrics["rows_without_preference"] == 6
    assert (metrics["train_rows"], metrics["refused_rows_read"], metrics["rows_held_out"]) == (9, 3, 0)
    assert metrics["held_out"] == {"good": 0, "bad": 0}
    assert "finetune.undesirable_weight between 1.50 and 2.00" in caplog.text


@pytest.mark.parametrize("pairs", ["kto"], indirect=True)
def test_the_only_bad_answer_is_learned_whatever_share_is_held_out(pairs, caplog):
    split = pairs / "artifacts/split"
    write_rows(split / "train.parquet", [replace(row, tags={"feedback": "thumb"}) for row in rows(6)])
    (bad,) = rows(1, 100)
    write_rows(split / "refused.parquet", [replace(bad, is_desirable=False)])
    write_rows(split / "validation.parquet", rows(4, 1000))
    # The seed that takes it: by the hash of its group.
    seed = next(seed for seed in range(100) if not _is_learned(bad, seed))
    change_finetune(pairs, held_out_share=0.5, seed=seed)
    main()
    assert (evidence(pairs)["good_answers"], evidence(pairs)["bad_answers"]) == (6, 1)
    assert evidence(pairs)["rows_held_out"] == 0
    assert "no ratings are held out" in caplog.text


def _is_learned(bad, seed):
    answer = Encoded([1, 2], 1)
    rated = [RatedAnswer(one, answer, one is not bad) for one in (*rows(6), bad)]
    return any(not one.is_desirable for one in hold_out(rated, [], 0.5, seed)[0])


@pytest.mark.parametrize("pairs", ["dpo"], indirect=True)
def test_a_pair_of_which_one_answer_is_too_long_is_excluded_whole(pairs):
    some = rows(12, with_pairs=True)
    long = make_row(some[0].messages, "toy", "cc0-1.0", rejected=Message("assistant", "x" * 300))
    write_rows(pairs / "artifacts/split/train.parquet", [long, *some[1:]])
    main()
    assert (evidence(pairs)["train_rows"], evidence(pairs)["rejected_long_rows"]) == (11, 1)
    change_finetune(pairs, on_long_row="stop")
    with pytest.raises(InputError, match="1 answers exceed 200 tokens with their prompt"):
        main()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("dpo", "no training row has a rejected answer that finetune.method: dpo could learn from"),
        ("orpo", "no training row has a rejected answer"),
        ("kto", "there are 0 and 0"),
    ],
)
def test_rows_without_preferences_are_refused(project, method, message):
    change_finetune(project, method=method)
    with pytest.raises(InputError, match=message):
        main()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "dpo", "dropout": 0.1}, "finetune.dropout: 0.1 must be 0 with method: dpo"),
        ({"method": "kto", "batch_size": 1}, "finetune.batch_size: 1 must be 2 or more with method: kto"),
        ({"method": "orpo", "beta": 0}, "finetune.beta"),
        (
            {"method": "prefix_tuning", "gradient_checkpointing": True},
            "finetune.gradient_checkpointing: True must be auto or false with method: prefix_tuning",
        ),
    ],
)
def test_settings_that_contradict_the_method_are_refused(project, settings, message):
    change_finetune(project, **settings)
    with pytest.raises(ParamsError, match=re.escape(message)):
        main()


@pytest.mark.slow
@pytest.mark.parametrize("pairs", ["dpo", "kto"], indirect=True)
def test_two_processes_learn_what_one_does(pairs):
    """To rounding; the divergence of kto is that of the whole batch, whoever has its rows."""
    main()
    alone, measured = losses(pairs), evidence(pairs)["held_out"]
    change_finetune(pairs, devices=2)
    main()
    assert evidence(pairs)["processes"] == 2
    assert losses(pairs) == pytest.approx(alone, abs=1e-3)
    assert evidence(pairs)["held_out"]["margin"] == pytest.approx(measured["margin"], abs=1e-2)


def test_what_preferences_add_is_not_in_the_evidence_of_other_methods(project):
    main()
    assert (
        not {"held_out", "preferences"}
        & json.loads((project / "reports/finetune/metrics.json").read_text()).keys()
    )
