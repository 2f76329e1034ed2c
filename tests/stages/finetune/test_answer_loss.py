import torch

from stages.finetune.answer_loss import sum_cross_entropy


def test_the_loss_and_its_gradient_are_those_of_pytorch_over_several_chunks():
    logits, targets = torch.randn(300, 11, requires_grad=True), torch.randint(11, (300,))
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / 7
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    loss = sum_cross_entropy(logits * 1.0, targets) / 7
    torch.testing.assert_close(loss, expected)
    leaf = logits.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(sum_cross_entropy(leaf * 1.0, targets) / 7, leaf)
    torch.testing.assert_close(gradient, expected_gradient)


def test_logits_are_left_alone_where_no_gradient_is_wanted():
    logits = torch.randn(3, 5)
    before = logits.clone()
    sum_cross_entropy(logits, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(logits, before, rtol=0, atol=0)
