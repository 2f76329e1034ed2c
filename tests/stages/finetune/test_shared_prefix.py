import pytest
import torch

from stages.common.chat.template import Encoded
from stages.finetune.answer_loss import sum_cross_entropy
from stages.finetune.shared_prefix import can_share_prefix, lay_out, use_shared_prefix
from tests.stages.families import build_config, build_model
from tests.tiny import make_model

PAD = 1
EXAMPLES = [
    Encoded([0, 5, 6, 7, 20, 30, 40, 1], 5),
    Encoded([0, 5, 6, 7, 21, 22, 31, 1], 6),
    Encoded([0, 5, 6, 7, 23, 1], 4),
    Encoded([0, 5, 6, 8, 24, 32, 33, 34, 35, 1], 5),
]


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def loss_and_gradient(model, batch):
    model.zero_grad()
    loss = sum_cross_entropy(batch.answer_logits(model), batch.targets)
    loss.backward()
    return loss.detach(), gradients(model)


def one_by_one(model, examples):
    model.zero_grad()
    total = torch.zeros(())
    for example in examples:
        ids = torch.tensor([example.input_ids])
        logits = model(input_ids=ids).logits[0]
        loss = sum(
            torch.nn.functional.cross_entropy(logits[a - 1 : b - 1], ids[0, a:b], reduction="sum")
            for a, b in example.learned
        )
        loss.backward()
        total += loss.detach()
    return total, gradients(model)


def assert_equal_but_for_rounding(found, expected, another=None):
    """Compare losses, and gradients by their length: with large weights their entries are large, too.

    Args:
        another: what transformers computes in another order: how far float32 is then from `expected` depends
            on the processor.
    """
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    whole = torch.cat([gradient.flatten() for gradient in expected[1].values()]).norm()
    for name, gradient in expected[1].items():
        rounding = (gradient - another[1][name]).norm() if another else 0.0
        bound = 1e-5 * gradient.norm() + 1e-6 * whole + rounding
        assert (found[1][name] - gradient).norm() <= bound, name


def test_a_batch_as_one_sequence_has_the_loss_and_gradients_of_its_rows_one_by_one():
    expected = one_by_one(make_model(), EXAMPLES)
    model = make_model()
    use_shared_prefix(model)
    batch = lay_out(EXAMPLES, PAD)
    assert batch.prefix_length == 3
    torch.testing.assert_close(loss_and_gradient(model, batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share_prefix", [True, False])
def test_several_answers_of_one_conversation_have_the_loss_and_gradients_of_each(share_prefix):
    talk = [0, 5, 6, 7, 20, 30, 1, 8, 9, 21, 31, 1, 7, 6, 22, 1]
    examples = [Encoded(talk, 4, given=((7, 9), (12, 14))), *EXAMPLES[:2]]
    assert examples[0].learned == [(4, 7), (9, 12), (14, 16)]
    model = make_model()
    alone = [Encoded(talk[:end], start) for start, end in examples[0].learned]
    expected = one_by_one(make_model(), [*alone, *EXAMPLES[:2]])
    torch.testing.assert_close(one_by_one(make_model(), examples), expected, rtol=1e-4, atol=1e-5)
    if share_prefix:
        use_shared_prefix(model)
    batch = lay_out(examples, PAD, share_prefix)
    torch.testing.assert_close(loss_and_gradient(model, batch), expected, rtol=1e-4, atol=1e-5)


def test_padded_rows_have_the_same_loss_and_gradients_too():
    expected = one_by_one(make_model(), EXAMPLES)
    batch = lay_out(EXAMPLES, PAD, share_prefix=False)
    torch.testing.assert_close(loss_and_gradient(make_model(), batch), expected, rtol=1e-4, atol=1e-5)


def test_rows_with_nothing_in_common_and_a_row_alone_are_laid_out_as_well():
    strangers = [Encoded([3, 4, 5, 1], 2), Encoded([6, 7, 8, 9, 1], 3)]
    for examples in (strangers, strangers[:1]):
        model = make_model()
        use_shared_prefix(model)
        expected = one_by_one(make_model(), examples)
        result = loss_and_gradient(model, lay_out(examples, PAD))
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_the_prefix_leaves_each_row_the_prompt_token_that_predicts_its_answer():
    same = [Encoded([0, 5, 6, 1], 3), Encoded([0, 5, 6, 9, 1], 3)]
    batch = lay_out(same, PAD)
    assert batch.prefix_length == 2
    assert batch.targets.tolist() == [1, 9, 1]
    assert batch.input_ids[0, batch.answer_positions].tolist() == [6, 6, 9]


@pytest.mark.parametrize("window", [1, 3, 5, 100])
@pytest.mark.parametrize("family", ["mistral", "gemma2", "qwen2"])
def test_a_window_that_rows_reach_or_not_hides_the_same_tokens_as_in_rows_one_by_one(family, window):
    config = build_config(family, 50)
    config.sliding_window = window
    if family == "qwen2":
        config.layer_types = ["full_attention", "sliding_attention"]
    expected = one_by_one(build_model(config), EXAMPLES)
    model = build_model(config)
    assert can_share_prefix(model)
    use_shared_prefix(model)
    assert_equal_but_for_rounding(loss_and_gradient(model, lay_out(EXAMPLES, PAD)), expected)


def test_a_window_that_a_layer_does_not_pass_on_is_found_in_its_settings():
    config = build_config("qwen2", 50)
    config.sliding_window, config.layer_types = 3, ["full_attention", "sliding_attention"]
    model = build_model(config)
    expected = one_by_one(model, EXAMPLES)
    use_shared_prefix(model)
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    assert_equal_but_for_rounding(loss_and_gradient(model, lay_out(EXAMPLES, PAD)), expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [("attention_dropout", 0.1), ("attn_pdrop", 0.1), ("layer_types", ["chunked_attention"])],
)
def test_models_that_attend_otherwise_do_not_share_a_prefix(key, value):
    model = make_model()
    assert can_share_prefix(model)
    setattr(model.config, key, value)
    assert not can_share_prefix(model)
