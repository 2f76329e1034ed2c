"""Faster training steps for a LoRA adapter: the same sums, with less memory moved.

On a CPU most of a training step is not matrix products but the small operations around them, and
PyTorch's CPU attention, whose backward pass in bfloat16 takes nine times as long as three matrix products.
`speed_up` gives the known parts of a peft model hand-written forward and backward passes and leaves
every part that it does not know as it is. `docs/benchmarks.md` has the measured gains.
"""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from stages.finetune.devices.sharding import gather_whole

# Numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed blocks for the next step; return whether it took the setting.

    By default each activation above 32 MiB is mapped, zeroed page by page and unmapped at every step,
    and the heap's top is handed back: an elementwise product then costs ten times its arithmetic.
    Elsewhere than on glibc this does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    settings = ((_M_MMAP_THRESHOLD, 1 << 30), (_M_TRIM_THRESHOLD, (1 << 31) - 1), (_M_TOP_PAD, 64 << 20))
    return all(mallopt(name, value) == 1 for name, value in settings)


def speed_up(model: Any) -> dict[str, int]:
    """Replace the forward passes of the known modules of a peft model; return how many of each kind.

    Linear layers are replaced if their adapter is plain LoRA without dropout; norms if their weights are
    frozen and their results on random numbers are those of `rms_norm`. The parameters, their names and the
    file that `save_pretrained` writes stay what they are.
    """
    replaced = {"lora_linear": 0, "rms_norm": 0}
    for module in model.modules():
        if _is_plain_lora(module):
            module.forward = partial(_lora_forward, module)
            replaced["lora_linear"] += 1
        elif (form := _find_norm_form(module)) is not None:
            module.forward = partial(_rms_norm_forward, module, *form)
            replaced["rms_norm"] += 1
    return replaced


def slow_down(model: Any) -> None:
    """Give the modules that `speed_up` replaced their own forward passes back."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, partial) and forward.func in (_lora_forward, _rms_norm_forward):
            del module.forward


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return x W^T + bias + scale (x A^T) B^T, computed in the dtype of x; W and bias are frozen.

    A and B may be float32 masters of a bfloat16 computation; their gradients have their own dtype.
    """
    y: Tensor = _LoraLinear.apply(x, weight, bias, a, b, scale)
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Return (offset + w) x / sqrt(mean(x^2) + eps), computed in float32, in the dtype of x; w is frozen."""
    y: Tensor = _RmsNorm.apply(x, weight, eps, offset)
    return y


class _LoraLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        narrow_a = a.to(x.dtype)
        narrow_b = (b * scale).to(x.dtype)
        inner = rows @ narrow_a.t()
        y = torch.nn.functional.linear(rows, weight, bias)
        y.addmm_(inner, narrow_b.t())
        ctx.save_for_backward(rows, weight, inner, narrow_a, narrow_b)
        ctx.scale, ctx.adapter_dtype = scale, a.dtype
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, inner, narrow_a, narrow_b = ctx.saved_tensors
        dy = grads[0].reshape(-1, weight.shape[0])
        d_inner = dy @ narrow_b
        db = (dy.t() @ inner).to(ctx.adapter_dtype).mul_(ctx.scale)
        da = (d_inner.t() @ rows).to(ctx.adapter_dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight).addmm_(d_inner, narrow_a).view(*grads[0].shape[:-1], -1)
        return dx, None, None, da, db, None


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        wide = x.float()
        norm: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = offset
        y: Tensor = wide.mul(inverse).mul_(weight.float() + offset)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        wide = x.float()
        dy = grads[0].float() * (weight.float() + ctx.offset)
        # d/dx of x r(x): r dy - x r^3 mean(dy x)
        mean = (dy * wide).mean(dim=-1, keepdim=True)
        dx = dy.addcmul_(wide, mean.mul_(inverse).mul_(inverse), value=-1.0).mul_(inverse)
        return dx.to(x.dtype), None, None, None


def _lora_forward(module: Any, x: Tensor) -> Tensor:
    adapter = module.active_adapters[0]
    base = module.base_layer
    a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    # GPT-2 keeps its weights as [inputs, outputs].
    weight = base.weight.t() if module.fan_in_fan_out else base.weight
    return lora_linear(x, weight, base.bias, a, b, module.scaling[adapter])


def _is_plain_lora(module: Any) -> bool:
    from peft.tuners.lora.layer import Linear
    from transformers.pytorch_utils import Conv1D

    if type(module) is not Linear:
        return False
    layer = Conv1D if module.fan_in_fan_out else torch.nn.Linear
    if type(module.base_layer) is not layer:
        return False
    if module.merged or module.disable_adapters or len(module.active_adapters) != 1:
        return False
    adapter = module.active_adapters[0]
    return (
        isinstance(module.lora_dropout[adapter], torch.nn.Identity)
        and module.lora_B[adapter].bias is None
        and adapter not in module.lora_variant
        and not module.base_layer.weight.requires_grad
    )


def _find_norm_form(module: Any) -> tuple[float, float] | None:
    """Return eps and offset with which `rms_norm` computes what a module computes, or None.

    Transformers has an RMS norm of its own for each architecture. Most multiply by the weight, Gemma's by
    1 + weight, and some do more: so it is asked for its results instead of its name.
    """
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float) or [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    weight = module.weight
    if weight.dim() != 1 or weight.requires_grad:
        return None
    generator = torch.Generator().manual_seed(0)
    weight = gather_whole(weight.detach())
    x = torch.randn(3, len(weight), generator=generator)
    x *= torch.tensor([[eps**0.5], [1.0], [30.0]])  # eps decides the first row
    x = x.to(weight.device)
    with torch.no_grad():
        try:
            wanted = torch.func.functional_call(module, {"weight": weight}, (x,))
        except (RuntimeError, TypeError, ValueError):
            return None  # it takes other inputs
        for offset in (0.0, 1.0):
            found = rms_norm(x, weight, eps, offset)
            same = isinstance(wanted, Tensor) and wanted.shape == found.shape and wanted.dtype == found.dtype
            if same and torch.allclose(found, wanted, rtol=1e-5, atol=1e-6):
                return eps, offset
    return None


def _rms_norm_forward(module: Any, eps: float, offset: float, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight, eps, offset)
