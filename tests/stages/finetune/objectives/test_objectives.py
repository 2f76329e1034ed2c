"""What each objective lays out, keeps of the reference, and leaves to other processes."""

import json
from dataclasses import replace

import pytest
import torch

from stages.finetune.objectives.answers import Answers
from stages.finetune.objectives.data import count_ratings, describe_imbalance, hold_out
from stages.finetune.objectives.distillation import Distillation
from stages.finetune.objectives.pairs import Pairs
from stages.finetune.objectives.protocol import make_idle
from stages.finetune.objectives.ratings import Ratings, choose_partners
from stages.finetune.objectives.reference import FILE
from stages.finetune.objectives.summary import summarise_pairs, summarise_ratings
from tests.stages.finetune.objectives.examples import arrange, make_pairs, make_ratings, start
from tests.tiny import make_model


def make(kind):
    pairs, ratings = make_pairs(), make_ratings()
    return {
        "answers": lambda: Answers([pair.chosen for pair in pairs]),
        "dpo": lambda: Pairs(pairs, pairs[:1], 0.1, has_reference=True),
        "orpo": lambda: Pairs(pairs, pairs[:1], 0.1, has_reference=False),
        "distill": lambda: Distillation([pair.chosen for pair in pairs], make_model(2), 1, 0.5, 1.0),
        "kto": lambda: Ratings(ratings[:3], ratings[:2], 0.1, (1.0, 1.0)),
    }[kind]()


@pytest.mark.parametrize("kind", ["answers", "dpo", "orpo", "kto"])
def test_the_loss_of_a_batch_is_the_sum_of_that_of_its_rows(tmp_path, kind):
    """Of kto up to the divergence, which is the batch's: it is none where the model is the reference."""
    model, objective = make_model(1), make(kind)
    objective.prepare(model, start(tmp_path))
    both = objective.compute_loss(model, objective.collate([0, 1], arrange))
    each = [objective.compute_loss(model, objective.collate([row], arrange)) for row in (0, 1)]
    torch.testing.assert_close(both, each[0] + each[1])
    assert sum(objective.lengths) == sum(len(one.input_ids) for one in objective.sequences)


@pytest.mark.parametrize("kind", ["answers", "dpo", "orpo", "kto"])
def test_a_process_without_a_row_computes_along_and_learns_nothing(tmp_path, kind):
    model, objective = make_model(1).train(), make(kind)
    objective.prepare(model, start(tmp_path))
    idle = make_idle(objective.collate([0], arrange))
    assert (idle.rows, len(idle.units)) == ([], 0)
    if kind == "kto":  # another process has the rows of which the divergence is the mean
        idle = make_idle(objective.collate([0], arrange))
        objective._estimate_divergence = lambda model, batch: 0.0
    loss = objective.compute_loss(model, idle)
    loss.backward()
    assert loss.item() == 0.0
    assert all(weight.grad is not None and not weight.grad.any() for weight in model.parameters())


@pytest.mark.parametrize("kind", ["answers", "dpo", "kto", "distill"])
def test_every_pass_is_told_with_the_model_that_only_reads(tmp_path, kind):
    model, objective, told = make_model(1), make(kind), []
    objective.prepare(model, start(tmp_path))
    batch = replace(objective.collate([0, 2], arrange), record=told.append)
    objective.compute_loss(model, batch)
    (learned,) = (one for one in told if one.reader is None)
    assert (learned.sequences, learned.width) == tuple(batch.layout.input_ids.shape)
    assert learned.answers == len(batch.layout.targets)
    assert learned.tokens == objective.lengths[0] + objective.lengths[2]
    readers = {"kto": model, "distill": getattr(objective, "teacher", None)}
    read = [one for one in told if one.reader is not None]
    assert [one.reader for one in read] == ([readers[kind]] if kind in readers else [])
    assert all((one.sequences, one.tokens) == (2, 0) for one in read)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_the_reference_is_the_model_that_training_starts_from(tmp_path, kind):
    first, objective, again = make_model(1), make(kind), make(kind)
    objective.prepare(first, start(tmp_path))
    batch = objective.collate([0, 1], arrange)
    at_start = {"dpo": 2 * 0.693147, "kto": 2 * 0.5}[kind]
    assert objective.compute_loss(first, batch).item() == pytest.approx(at_start, abs=1e-5)
    assert abs(objective.compute_loss(make_model(2), batch).item() - at_start) > 1e-3
    # A process that resumes takes what was kept, whatever the model is by then.
    again.prepare(make_model(2), start(tmp_path))
    torch.testing.assert_close(
        again.compute_loss(make_model(3), batch), objective.compute_loss(make_model(3), batch), rtol=0, atol=0
    )
    (tmp_path / FILE).write_text('{"learned": [')
    again.prepare(first, start(tmp_path))
    assert json.loads((tmp_path / FILE).read_text())["learned"]


def test_dropout_of_the_base_model_is_no_part_of_a_reward(tmp_path):
    model, objective = make_model(1, "gpt2", n_embd=16, n_layer=2, n_head=2, n_positions=64), make("dpo")
    objective.prepare(model, start(tmp_path))
    loss = objective.compute_loss(model.train(), objective.collate([0, 1, 2], arrange))
    assert loss.item() == pytest.approx(3 * 0.693147, abs=1e-5)


def test_a_prompt_gets_the_answer_of_another_one_and_a_batch_keeps_its_answers():
    groups = ["a", "a", "b", "b", "c", "d", "d"]
    partners = choose_partners([[0, 1, 2, 3, 4], [5], [6]], groups)
    assert {partners[row] for row in range(5)} == {0, 1, 2, 3, 4}
    assert all(groups[row] != groups[partners[row]] for row in range(5))
    # Alone in its batch, and all batches after it are of its own prompt: the first one's.
    assert (partners[5], partners[6]) == (0, 0)
    assert choose_partners([[0, 1], [2]], ["a", "a", "b"]) == {0: 2, 1: 2, 2: 0}
    assert choose_partners([[0, 1, 2], [3]], ["a", "a", "a", "b"]) == {0: 3, 1: 3, 2: 3, 3: 0}
    assert choose_partners([[0, 1], [2]], ["a"] * 3) == {0: 1, 1: 0, 2: 2}  # there is no other prompt


def test_another_answer_is_no_longer_than_the_longest_row(tmp_path):
    objective = make("kto")
    objective.prepare(make_model(1), start(tmp_path))
    others = objective._list_others([0, 1, 2])
    assert max(len(one.input_ids) for one in others) <= max(objective.lengths)
    assert all(one.learned_count >= 1 for one in others)


def test_the_answers_to_a_prompt_are_learned_together_or_measured_together():
    ratings = make_ratings()
    learned, held_out = hold_out(ratings, [], 0.5, 3)
    assert len(learned) + len(held_out) == 6 and held_out and learned
    assert not {one.row.group for one in learned} & {one.row.group for one in held_out}
    assert hold_out(ratings, [], 0.5, 3) == (learned, held_out)
    assert hold_out(ratings, ratings[:2], 0.5, 3) == (ratings, ratings[:2])
    assert hold_out(ratings[:2], [], 0.999999, 3) == (ratings[:2], [])  # something must be learned


def test_an_imbalance_of_ratings_is_described_with_the_weight_that_corrects_it():
    assert count_ratings(make_ratings()) == (3, 3)
    assert describe_imbalance(30, 30, 1.0, 1.0) is None
    advice = describe_imbalance(120, 30, 1.0, 1.0)
    assert "4.00 to 1" in advice and "between 3.00 and 4.00" in advice
    assert describe_imbalance(120, 30, 1.0, 3.5) is None


def test_the_summary_of_pairs_counts_those_whose_better_answer_has_the_higher_reward():
    found = summarise_pairs([(1.0, 0.0), (0.5, 1.0), (2.0, -1.0), (0.0, 0.0)], [(0, 1)] * 4, [(1, 0)] * 4)
    assert (found["accuracy"], found["margin"]) == (0.625, 0.875)
    assert (found["likelier_before"], found["likelier_after"]) == (0, 1)
    assert summarise_pairs([], [], []) == {"pairs": 0}
    ratings = summarise_ratings([1.0, 0.0], [0.0, -1.0, 2.0])
    assert ratings["accuracy"] == (2 + 1.5) / 6
    assert summarise_ratings([1.0], []) == {"good": 1, "bad": 0}
