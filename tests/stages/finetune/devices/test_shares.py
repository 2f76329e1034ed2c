"""The shares of a batch learn together what the whole batch learns."""

import pytest
import torch

from stages.common.chat.template import encode_example
from stages.common.model.loading import load_tokenizer
from stages.finetune.adapter import build_model
from stages.finetune.answer_loss import sum_cross_entropy
from stages.finetune.batches import deal_out, plan_batches
from stages.finetune.shared_prefix import lay_out
from stages.finetune.speedups import speed_up_training
from tests.stages.finetune.project import make_recipe, rows
from tests.tiny import save_model

RECIPE = make_recipe(schedule="constant", warmup_fraction=0.0)


def test_the_shares_of_a_batch_are_its_rows_as_many_shares_for_each_batch():
    plan = plan_batches([10 + n % 13 for n in range(43)], batch_size=8, epochs=2, seed=7)
    assert deal_out(plan, 1) == plan
    shares = deal_out(plan, 3)
    assert len(shares) == 3 * len(plan)
    for number, batch in enumerate(plan):
        own = shares[3 * number : 3 * number + 3]
        assert sorted(row for share in own for row in share) == sorted(batch)
        assert max(map(len, own)) - min(map(len, own)) <= 1


def test_a_batch_with_fewer_rows_than_processes_leaves_empty_shares():
    assert deal_out([[5, 2, 9], [4]], 2) == [[5, 9], [2], [4], []]


@pytest.fixture(params=[True, False], ids=["one sequence", "padded rows"])
def model_and_layout(request, tmp_path):
    folder = save_model(tmp_path)
    model = build_model(folder, RECIPE)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # from zero, the gradient of A would be zero
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    tokenizer = load_tokenizer(folder)
    examples = [encode_example(tokenizer, row.messages) for row in rows(5)]
    if request.param:
        assert speed_up_training(model, examples, tokenizer.pad_token_id)[0]

    def lay(numbers):
        return lay_out([examples[n] for n in numbers], tokenizer.pad_token_id, request.param)

    return model, lay


def gradients(model, layouts):
    model.zero_grad()
    total = sum(sum_cross_entropy(layout.answer_logits(model), layout.targets) for layout in layouts)
    total.backward()
    trained = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return float(total.detach()), trained


def test_the_losses_and_gradients_of_the_shares_add_up_to_those_of_the_batch(model_and_layout):
    model, lay = model_and_layout
    whole, expected = gradients(model, [lay(range(5))])
    parts = [gradients(model, [lay(share)]) for share in deal_out([list(range(5))], 3)]
    assert sum(loss for loss, _ in parts) == pytest.approx(whole, rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(sum(part[name] for _, part in parts), gradient, rtol=1e-4, atol=1e-5)
    assert any(gradient.abs().max() > 0 for gradient in expected.values())


def test_an_empty_share_has_no_loss_and_a_gradient_of_zero_for_every_weight(model_and_layout):
    model, lay = model_and_layout
    loss, found = gradients(model, [lay([0]).without_targets()])
    assert loss == 0.0 and found
    assert all(torch.count_nonzero(gradient) == 0 for gradient in found.values())
