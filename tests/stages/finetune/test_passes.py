"""The estimate before a training has the passes through the model that the training then takes."""

from collections import Counter

import pytest

from stages.common.messages import Message
from stages.common.params.loading import load_params
from stages.common.records import make_row, write_rows
from stages.common.run_estimate.methods import read_method
from stages.finetune.__main__ import main
from stages.finetune.objectives import reference
from stages.finetune.progress.meter import Meter
from tests.stages.finetune.project import change_finetune, make_project

BATCH, EPOCHS = 4, 2


def equal_rows(count, start=0, with_pairs=False):
    """Return rows whose answers, better and worse ones, have as many tokens each."""
    return [
        make_row(
            [Message("user", f"number {n}"), Message("assistant", f'{{"n":{n % 5}}}')],
            "toy",
            "cc0-1.0",
            rejected=Message("assistant", f'{{"m":{n % 5}}}') if with_pairs else None,
        )
        for n in range(start, start + count)
    ]


@pytest.mark.parametrize("method", ["lora", "dpo", "orpo", "kto", "distill"])
def test_the_estimate_has_the_passes_that_a_training_takes(tmp_path, monkeypatch, method):
    monkeypatch.chdir(
        make_project(tmp_path, method=method, teacher="teacher" if method == "distill" else None)
    )
    compares = method in ("dpo", "orpo", "kto")
    write_rows(tmp_path / "artifacts/split/train.parquet", equal_rows(16, with_pairs=compares))
    write_rows(tmp_path / "artifacts/split/validation.parquet", equal_rows(4, 100))
    change_finetune(tmp_path, batch_size=BATCH, epochs=EPOCHS, held_out_share=0.0)
    answers, learning = Counter(), []  # answer tokens by what they go through
    count, score = Meter.count, reference.sum_log_probabilities

    def count_pass(meter, one):
        answers[one.reader is None] += one.answers
        learning.append(one.answers if one.reader is None else 0)
        count(meter, one)

    def score_reference(model, layout, learned):
        answers["before"] += sum(learned)
        return score(model, layout, learned)

    monkeypatch.setattr(Meter, "count", count_pass)
    monkeypatch.setattr(reference, "sum_log_probabilities", score_reference)
    main()

    work = read_method(load_params().finetune)
    once = answers[True] / EPOCHS
    each = once / (16 * (2 if compares else 1))
    assert max(learning) == work.in_memory * BATCH * each
    assert answers["before"] == work.scored_before * once
    if method == "distill":  # the teacher computes its output layer for each token
        assert work.is_beside and answers[False] >= answers[True]
    else:
        assert answers[False] == work.scored * answers[True]
