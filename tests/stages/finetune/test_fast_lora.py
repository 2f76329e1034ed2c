import pytest
import torch
from peft import LoraConfig, get_peft_model

from stages.finetune.fast_lora import keep_freed_memory, lora_linear, rms_norm, slow_down, speed_up
from tests.tiny import make_model


def lora(model, **changes):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}
    return get_peft_model(model, LoraConfig(**settings))


def gradients(model, ids):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def test_the_hand_written_gradients_of_a_lora_linear_are_those_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, a, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 3, 5), (4, 5), (4,), (2, 5), (4, 2))
    )
    for wanted in (x, a, b):
        wanted.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a, b: lora_linear(x, weight, bias, a, b, 0.7), (x, a, b))


def test_a_lora_linear_whose_input_needs_no_gradient_still_gives_those_of_the_adapter():
    x, weight = torch.randn(3, 5), torch.randn(4, 5)
    a, b = torch.randn(2, 5, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    lora_linear(x, weight, None, a, b, 2.0).square().sum().backward()
    fast = a.grad.clone(), b.grad.clone()
    a.grad = b.grad = None
    (x @ weight.T + 2.0 * x @ a.T @ b.T).square().sum().backward()
    torch.testing.assert_close(fast, (a.grad, b.grad), rtol=1e-4, atol=1e-4)


def test_the_hand_written_rms_norm_agrees_with_pytorch_forward_and_backward():
    x, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(8)
    upstream = torch.randn(2, 3, 8)
    expected = torch.nn.functional.rms_norm(x, (8,), weight, 1e-5)
    (expected_gradient,) = torch.autograd.grad(expected, x, upstream)
    y = rms_norm(x, weight, 1e-5)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_a_model_made_fast_has_the_same_loss_and_gradients_and_can_be_put_back():
    model = lora(make_model())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    ids = torch.randint(258, (2, 9))
    loss, plain = gradients(model, ids)
    assert speed_up(model) == {"lora_linear": 14, "rms_norm": 5}
    fast_loss, fast = gradients(model, ids)
    torch.testing.assert_close(fast_loss, loss)
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-5)
    slow_down(model)
    torch.testing.assert_close(gradients(model, ids)[1], plain, rtol=0, atol=0)


def test_in_bfloat16_the_adapter_stays_float32_and_its_gradients_are_close():
    model = lora(make_model())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(258, (2, 9))
    _, exact = gradients(model, ids)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    speed_up(model)
    _, narrow = gradients(model, ids)
    assert all(gradient.dtype == torch.float32 for gradient in narrow.values())
    one, other = (torch.cat([g.flatten() for g in grads.values()]) for grads in (exact, narrow))
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.99


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_adapters_that_are_not_plain_lora_are_left_as_they_are(settings):
    assert speed_up(lora(make_model(), **settings))["lora_linear"] == 0


def test_keeping_freed_memory_never_fails():
    assert keep_freed_memory() in (True, False)
