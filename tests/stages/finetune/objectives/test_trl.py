"""Losses and gradients are those of trl's own trainers, on the same models and tokens."""

from types import SimpleNamespace

import pytest
import torch

from stages.finetune.objectives.losses import compare_in_groups, compute_orpo_losses
from stages.finetune.objectives.pairs import Pairs
from stages.finetune.objectives.ratings import Ratings
from tests.stages.finetune.objectives.examples import arrange, make_pairs, make_ratings, start
from tests.stages.finetune.objectives.test_groups import make_groups
from tests.tiny import make_model, make_tokenizer

pytestmark = pytest.mark.slow  # trl and datasets take seconds to import


def settings(folder):
    return {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "beta": 0.3}


def make_like(model):
    """Return the same model without what trl changes of its forward pass."""
    plain = make_model(0)
    plain.load_state_dict(model.state_dict())
    return plain


def check_equal(model, theirs, objective, rows):
    """Compare the mean loss of rows, and its gradients, with those of a trainer of trl."""
    plain = make_like(model)
    ours = objective.compute_loss(plain, objective.collate(rows, arrange)) / len(rows)
    torch.testing.assert_close(ours.detach(), theirs.detach())
    model.zero_grad()
    theirs.backward()
    ours.backward()
    for (name, weight), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(other.grad, weight.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_dpo(tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    pairs, model, reference = make_pairs(), make_model(1), make_model(2)
    trainer = DPOTrainer(
        model,
        reference,
        DPOConfig(**settings(tmp_path), gradient_checkpointing=False),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2),
        processing_class=make_tokenizer(),
    )
    inputs = DataCollatorForPreference(pad_token_id=1)(
        [
            {
                "prompt_ids": pair.chosen.input_ids[: pair.chosen.prompt_length],
                "chosen_ids": pair.chosen.input_ids[pair.chosen.prompt_length :],
                "rejected_ids": pair.rejected.input_ids[pair.rejected.prompt_length :],
            }
            for pair in pairs
        ]
    )
    theirs = trainer.compute_loss(model, inputs)
    objective = Pairs(pairs, [], 0.3, has_reference=True)
    objective.prepare(make_model(2), start(tmp_path, [[0, 1, 2]]))
    check_equal(model, theirs, objective, [0, 1, 2])


def test_kto(tmp_path):
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    ratings, model, reference = make_ratings(), make_model(1), make_model(2)
    trainer = KTOTrainer(
        model,
        reference,
        KTOConfig(
            **settings(tmp_path),
            gradient_checkpointing=False,
            desirable_weight=1.2,
            undesirable_weight=0.7,
            per_device_train_batch_size=2,
        ),
        train_dataset=Dataset.from_list(
            [{"prompt": "a", "completion": "b", "label": n % 2 == 0} for n in range(4)]
        ),
        processing_class=make_tokenizer(),
    )
    objective = Ratings(ratings, [], 0.3, (1.2, 0.7))
    plan = [list(range(len(ratings)))]
    objective.prepare(make_model(2), start(tmp_path, plan))
    others = objective._list_others(plan[0])
    inputs = DataCollatorForUnpairedPreference(pad_token_id=1)(
        [
            {
                "prompt_ids": one.answer.input_ids[: one.answer.prompt_length],
                "completion_ids": one.answer.input_ids[one.answer.prompt_length :],
                "KL_completion_ids": other.input_ids[other.prompt_length :],
                "label": one.is_desirable,
            }
            for one, other in zip(ratings, others, strict=True)
        ]
    )
    theirs = trainer.compute_loss(model, inputs)
    check_equal(model, theirs, objective, plan[0])


def test_orpo():
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    chosen, rejected = torch.tensor([-0.5, -2.0, -0.01]), torch.tensor([-1.5, -0.3, -4.0])
    theirs = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0]
    torch.testing.assert_close(compute_orpo_losses(chosen, rejected, 0.3), -chosen - theirs)


def test_grpo_reads_the_probabilities_at_the_temperature_that_sampled(tmp_path, monkeypatch):
    from trl.trainer.utils import selective_log_softmax

    model, groups = make_model(1), make_groups(size=2, temperature=2.0)
    groups.prepare(model, start(tmp_path))
    answers = [[[40, 41, 1], [50, 51, 52, 1]]]
    monkeypatch.setattr(groups, "_sample", lambda model, batch: answers)
    monkeypatch.setattr(groups, "_reward", lambda rows, found: [1.0, 0.0])
    prompt, plain = groups._prompts[0], make_like(model)
    groups.compute_loss(plain, groups.collate([0], arrange)).backward()
    for tokens, advantage in zip(answers[0], compare_in_groups(torch.tensor([1.0, 0.0]), 2), strict=True):
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[:, len(prompt) - 1 : -1]
        theirs = selective_log_softmax(logits, torch.tensor([tokens]), temperature=2.0)
        # trl's loss at a ratio of 1, whose gradient is that of the log-probability.
        (-advantage * torch.exp(theirs - theirs.detach())).mean().backward()
    for (name, weight), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(other.grad, weight.grad, rtol=1e-4, atol=1e-6, msg=name)
