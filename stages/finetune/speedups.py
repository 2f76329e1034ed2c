"""Apply the faster training steps to a model, after checking that its loss stays the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from peft import PeftModel

from stages.common.chat.template import Encoded
from stages.common.logs import get_logger, is_full_memory
from stages.common.spool import pick
from stages.finetune.answer_loss import chunk_head, compute_loss, unchunk_head
from stages.finetune.devices.group import all_agree
from stages.finetune.fast_lora import keep_freed_memory, slow_down, speed_up
from stages.finetune.kernels.packed import PACKED, can_pack, use_packed
from stages.finetune.shared_prefix import can_share_prefix, lay_out, use_shared_prefix

logger = get_logger("finetune")


def speed_up_training(model: Any, examples: Sequence[Encoded], pad_id: int) -> tuple[bool, dict[str, int]]:
    """Make the training steps of `model` faster, if its loss stays the same.

    Some architectures compute differently from what the faster code assumes. So the loss of a few rows is
    computed before and after; if it differs, the next slower way is tried.

    Returns:
        whether a batch is one sequence with a shared prefix, and the number of faster modules, by kind.
    """
    keep_freed_memory()
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # peft leaves the dropout of a new adapter on, with which no two losses are the same
    found = _choose_way(model, examples, pad_id)
    for module, mode in modes:
        module.training = mode
    return found


def _choose_way(model: Any, examples: Sequence[Encoded], pad_id: int) -> tuple[bool, dict[str, int]]:
    base = _get_base(model)
    lengths = [len(example.input_ids) for example in examples]
    few = pick(examples, sorted(range(len(examples)), key=lengths.__getitem__)[-4:])
    padded = lay_out(few, pad_id, share_prefix=False).to(model.device)
    plain = compute_loss(model, padded)
    usual_attention = base.config._attn_implementation
    share_prefix = can_share_prefix(base)
    modules = speed_up(model)
    if chunk_head(base, padded):
        modules["output_layer"] = 1
    ways: list[Callable[[Any], None]] = [use_shared_prefix] if share_prefix else [lambda _: None]
    if share_prefix and all_agree(can_pack(base)):
        ways.insert(0, use_packed)
    for attend in ways:
        attend(base)
        if _keeps_loss(model, few, pad_id, share_prefix, plain):
            return share_prefix, modules
    logger.warning("training without the faster code, more slowly")
    slow_down(model)
    unchunk_head(base)
    base.set_attn_implementation(usual_attention)
    return False, {}


def is_packed(model: Any) -> bool:
    """Return whether a model attends to batches without padding."""
    return bool(_get_base(model).config._attn_implementation == PACKED)


def _keeps_loss(model: Any, few: Sequence[Encoded], pad_id: int, share_prefix: bool, plain: float) -> bool:
    """Return whether the loss of a few rows is what it was, in all processes; log why not."""
    fast, problem = float("nan"), ""
    try:
        fast = compute_loss(model, lay_out(few, pad_id, share_prefix, is_packed(model)))
    except (RuntimeError, ValueError) as error:  # a kernel that does not take these shapes
        if is_full_memory(error):
            raise
        problem = (str(error).splitlines() or [type(error).__name__])[0]
    # bfloat16 keeps three digits; a wrong attention changes the first. Processes on different machines may
    # find different losses, and must do the same.
    if all_agree(abs(fast - plain) <= 0.02 * abs(plain) + 0.01):
        return True
    logger.warning(
        "the faster training code changes the loss of this model (%.4f instead of %.4f) %s",
        fast,
        plain,
        problem,
    )
    return False


def _get_base(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model
