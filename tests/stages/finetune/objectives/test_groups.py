"""Sampling answers, rewarding them, and learning from them."""

import csv
from dataclasses import replace

import pytest
import torch

from stages.common.artifacts import write_json
from stages.common.chat.template import encode_example
from stages.common.errors import InputError
from stages.common.messages import Message
from stages.common.model.generation import answer_questions, encode_questions, sample_answers
from stages.common.params.loading import ParamsError
from stages.common.records import make_row
from stages.common.task.json_task import JsonTask
from stages.finetune.__main__ import main
from stages.finetune.objectives.groups import Groups
from stages.finetune.objectives.protocol import Batch, Pass
from stages.finetune.objectives.rewards import make_checks
from tests.stages.finetune.objectives.examples import arrange, start
from tests.stages.finetune.project import adapter, change_finetune, evidence, make_project, rows
from tests.tiny import make_model, make_tokenizer

WEIGHTS = {"valid": 0.25, "schema": 0.25, "match": 1.0}


def numbers(seed, prompts=3, size=2, tokens=12):
    return torch.rand(prompts, size, tokens, generator=torch.Generator().manual_seed(seed))


def test_an_answer_is_drawn_by_the_models_probabilities_and_the_same_from_the_same_numbers():
    model, tokenizer = make_model(1), make_tokenizer()
    questions = encode_questions(tokenizer, rows(3))
    prompts = [question.prompt for question in questions]
    first, again, other = (
        sample_answers(model, tokenizer, prompts, 1.0, numbers(seed)) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert all(0 < len(tokens) <= 12 and len(group) == 2 for group in first for tokens in group)
    for place, number in ((0, 1), (2, 0)):  # an answer alone is the one that it is among others
        alone = sample_answers(
            model, tokenizer, [prompts[place]], 1.0, numbers(1)[place : place + 1, number : number + 1]
        )
        assert alone == [[first[place][number]]]
    cold = [group[0] for group in sample_answers(model, tokenizer, prompts, 1e-4, numbers(1))]
    likeliest = [answer.text for answer in answer_questions(model, tokenizer, questions, 3, 12)]
    ends = {tokenizer.eos_token_id}
    assert [tokenizer.decode([t for t in tokens if t not in ends]) for tokens in cold] == likeliest
    # One token after one prompt, often: the shares are the model's.
    model.lm_head.weight.data *= 8
    many = sample_answers(model, tokenizer, [prompts[0]], 1.0, numbers(3, 1, 4000, 1))
    counts = torch.bincount(torch.tensor(many).flatten(), minlength=258) / 4000
    shares = torch.softmax(model(torch.tensor([prompts[0]])).logits[0, -1], dim=-1)
    assert float((counts - shares).abs().max()) < 0.05


def test_an_answer_is_worth_what_it_passes():
    answers = ['{"intent":"On","area":"hall"}', '{"intent":"Off"}']
    checks = make_checks(JsonTask("intent"), answers, WEIGHTS)
    row = make_row([Message("user", "a"), Message("assistant", answers[1])], "toy", "mit")
    worth = {
        '{ "intent": "Off" }': 1.5,
        '{"intent":"On"}': 0.5,
        '{"intent":"Off","colour":"red"}': 0.25,
        "Off": 0.0,
        None: 0.0,
    }
    assert {answer: checks.weigh(checks.run(row, answer)) for answer in worth} == worth


def make_groups(size=4, kl_weight=0.0, temperature=1.0):
    tokenizer, some = make_tokenizer(), rows(3)
    checks = make_checks(JsonTask(None), [row.answer for row in some], {"valid": 1.0})
    examples = [encode_example(tokenizer, row.messages) for row in some]
    return Groups(some, examples, tokenizer, checks, size, 6, temperature, kl_weight, 0.2, 7)


def test_what_is_sampled_follows_from_the_update_and_not_from_what_was_drawn_before(tmp_path):
    model, groups = make_model(1), make_groups()
    groups.prepare(model, start(tmp_path))
    batch = groups.collate([0, 2], arrange)
    torch.rand(5)
    one = groups._sample(model, batch)
    assert len(one) == 2 and all(len(group) == 4 for group in one)
    assert groups._sample(model, batch) == one
    assert groups._sample(model, groups.collate([2], arrange)) == one[1:]  # as another process has it
    moved = Batch(batch.rows, batch.layout, batch.learned, batch.units, place=(1, 0))
    assert groups._sample(model, moved) != one


def test_the_gradient_raises_the_better_answers_of_a_group_and_lowers_the_others(tmp_path, monkeypatch):
    model, groups = make_model(1), make_groups(size=2)
    groups.prepare(model, start(tmp_path))
    answers = [[[40, 41, 1], [50, 51, 52, 1]]]
    monkeypatch.setattr(groups, "_sample", lambda model, batch: answers)
    monkeypatch.setattr(groups, "_reward", lambda rows, found: [1.0, 0.0])
    batch = groups.collate([0], arrange)
    assert len(batch.units) == 2

    def likely(tokens):
        prompt = groups._prompts[0]
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        each = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(tokens)[:, None])
        return float(each.detach().mean())

    before = [likely(tokens) for tokens in answers[0]]
    loss = groups.compute_loss(model, batch)
    assert loss.item() == pytest.approx(0.0, abs=1e-5)  # at a ratio of 1 advantages add up to nothing
    loss.backward()
    for weight in model.parameters():
        weight.data -= 0.01 * weight.grad
    after = [likely(tokens) for tokens in answers[0]]
    assert after[0] > before[0] and after[1] < before[1]
    monkeypatch.setattr(groups, "_reward", lambda rows, found: [1.0, 1.0])
    model.zero_grad()
    groups.compute_loss(model, batch).backward()
    assert all(not weight.grad.any() for weight in model.parameters())  # alike: none is better


def test_the_divergence_is_that_from_the_weights_at_the_start(tmp_path, monkeypatch):
    model, groups = make_model(1), make_groups(size=2, kl_weight=0.5)
    groups.prepare(model, start(tmp_path))
    monkeypatch.setattr(groups, "_sample", lambda model, batch: [[[40, 1], [50, 1]]])
    monkeypatch.setattr(groups, "_reward", lambda rows, found: [0.0, 0.0])
    batch = groups.collate([0], arrange)
    assert groups.compute_loss(model, batch).item() == pytest.approx(0.0, abs=1e-6)
    for weight in model.parameters():
        weight.data += 0.05
    moved = [weight.detach().clone() for weight in model.parameters()]
    assert groups.compute_loss(model, batch).item() > 1e-6
    assert all(map(torch.equal, model.parameters(), moved))


def test_what_is_computed_is_told_with_the_answers_that_were_sampled(tmp_path, monkeypatch):
    model, groups, told = make_model(1), make_groups(size=2, kl_weight=0.5), []
    groups.prepare(model, start(tmp_path))
    monkeypatch.setattr(groups, "_sample", lambda model, batch: [[[40, 41, 1], [50, 51, 52, 1]]])
    groups.compute_loss(model, replace(groups.collate([0], arrange), record=told.append))
    prompt = len(groups._prompts[0])
    sampled, reference, learned = told
    assert sampled == Pass(1, prompt + 7, 7, reader=model)
    assert learned == Pass(2, learned.width, 7, tokens=2 * prompt + 7)
    assert prompt + 3 <= learned.width <= prompt + 4
    assert reference == replace(learned, tokens=0, reader=model)
    figures = groups.take_figures()
    assert figures["answer_tokens"] == 3.5


@pytest.fixture
def grpo(tmp_path, monkeypatch):
    settings = {"method": "grpo", "group_size": 8, "rewards": {"valid": 1.0, "schema": 0.0}}
    monkeypatch.chdir(make_project(tmp_path, 40, **settings))
    return tmp_path


def test_a_training_samples_rewards_and_logs_and_gives_the_same_bytes_again(grpo):
    write_json(grpo / "artifacts/curate/task.json", {"kind": "text"})  # any text that ends is worth something
    main()
    metrics = evidence(grpo)
    assert metrics["method"] == "grpo" and metrics["steps"] == 10
    assert set(metrics["figures"]) == {"reward", "valid", "schema", "match", "compared", "answer_tokens"}
    with (grpo / "reports/finetune/loss.csv").open() as file:
        curve = list(csv.DictReader(file))
    names = [
        "step",
        "loss",
        "learning_rate",
        "reward",
        "valid",
        "schema",
        "match",
        "compared",
        "answer_tokens",
    ]
    assert list(curve[0]) == names
    assert any(float(point["reward"]) > 0 for point in curve)
    before = adapter(grpo), metrics
    main()
    assert (adapter(grpo), evidence(grpo)) == before


def test_a_training_in_which_no_answer_was_better_than_another_is_refused(grpo):
    change_finetune(grpo, rewards={"valid": 0.0, "schema": 0.0, "match": 1.0})
    with pytest.raises(InputError, match="nothing was learned: in 10 updates the answers of each group"):
        main()
    assert not (grpo / "artifacts/finetune").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rewards": {"valid": 0, "schema": 0, "match": 0}}, "are all 0"),
        ({"group_size": 1}, "finetune.group_size"),
        ({"rewards": {"exact": 1.0}}, "finetune.rewards"),
        ({"dropout": 0.1}, "must be 0 with method: grpo"),
    ],
)
def test_settings_that_teach_nothing_are_refused(grpo, settings, message):
    change_finetune(grpo, **settings)
    with pytest.raises(ParamsError, match=message):
        main()
