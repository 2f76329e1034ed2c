"""A head over labels learns from the last token of a prompt, on the same paths as other methods."""

from pathlib import Path

import pytest
import torch

from stages.common.chat.template import Encoded
from stages.common.errors import InputError
from stages.common.model.label_head import encode_label, find_labels
from stages.finetune.adapter import build_model
from stages.finetune.progress.flops import count_work
from stages.finetune.progress.memory import MemoryPlan
from stages.finetune.shared_prefix import lay_out
from stages.finetune.speedups import speed_up_training
from tests.stages.finetune.project import make_recipe
from tests.tiny import save_model

LABELS = ("a", "b", "c d")
ROWS = [Encoded([0, 5, 6, 7, *range(20 + n, 30 + 2 * n), 90, 91, 1], 14 + n) for n in (1, 4, 2)]
EXAMPLES = [encode_label(row, LABELS[n], LABELS) for n, row in enumerate(ROWS)]


@pytest.fixture(params=["float32", "bfloat16"])
def model(tmp_path, request):
    return build_model(save_model(tmp_path), make_recipe(method="head", labels=LABELS, dtype=request.param))


def test_a_row_ends_with_the_number_of_its_label_behind_its_prompt():
    assert [one.input_ids[-1] for one in EXAMPLES] == [0, 1, 2]
    assert [one.input_ids[:-1] for one in EXAMPLES] == [row.input_ids[: row.prompt_length] for row in ROWS]
    assert all(one.learned_count == 1 for one in EXAMPLES)
    turns = Encoded([0, 5, 6, 1, 7, 8, 9, 1], 2, given=((4, 6),))
    assert encode_label(turns, " c d\n", LABELS).input_ids == [0, 5, 6, 1, 7, 8, 2]
    with pytest.raises(InputError, match="'d' is none of the 3 labels"):
        encode_label(ROWS[0], "d", LABELS)


def test_only_the_head_is_trained_in_float32_by_the_softmax_of_the_last_hidden_state(model):
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == {"lm_head.weight", "lm_head.bias"} and find_labels(model) == LABELS
    assert {p.dtype for p in trained.values()} == {torch.float32}
    with torch.no_grad():
        trained["lm_head.weight"].normal_(generator=torch.Generator().manual_seed(0))
    for shares in (False, True):
        batch = lay_out(EXAMPLES, 1, shares)
        if shares:
            assert speed_up_training(model, EXAMPLES, 1)[0]
        logits = batch.answer_logits(model)
        loss = torch.nn.functional.cross_entropy(logits, batch.targets)
        assert logits.shape == (3, 3) and logits.dtype == torch.float32
        loss.backward()
        if not shares:
            padded, gradient = float(loss), model.lm_head.weight.grad.clone()
            model.zero_grad()
    tolerance = 1e-5 if model.dtype == torch.float32 else 0.02
    assert float(loss) == pytest.approx(padded, rel=tolerance)
    assert torch.allclose(model.lm_head.weight.grad, gradient, rtol=tolerance, atol=tolerance)


def test_a_step_goes_forward_only_and_takes_the_memory_of_the_head(model):
    work = count_work(model)
    layers = 2 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32)
    assert work.each_token == 2 * layers and work.each_answer_token == 6 * 3 * 16
    shares, _ = speed_up_training(model, EXAMPLES, 1)
    estimate = MemoryPlan(model, EXAMPLES, 1, shares).estimate(3, 100)
    assert estimate.optimizer == 3 * 17 * (4 + 8)
    other = build_model(Path(model.name_or_path), make_recipe(dtype=str(model.dtype).removeprefix("torch.")))
    assert estimate.activations < MemoryPlan(other, ROWS, 1, False).estimate(3, 100).activations
