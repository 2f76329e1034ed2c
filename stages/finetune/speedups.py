"""Apply the faster training steps to a model, after checking that its loss stays the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import PeftModel

from stages.common.chat.template import Encoded
from stages.common.logs import get_logger
from stages.common.spool import pick
from stages.finetune.answer_loss import compute_loss
from stages.finetune.devices.group import all_agree
from stages.finetune.fast_lora import keep_freed_memory, slow_down, speed_up
from stages.finetune.shared_prefix import can_share_prefix, lay_out, use_shared_prefix

logger = get_logger("finetune")


def speed_up_training(model: Any, examples: Sequence[Encoded], pad_id: int) -> tuple[bool, dict[str, int]]:
    """Make the training steps of `model` faster, if its loss stays the same.

    Some architectures compute differently from what the faster code assumes. So the loss of a few rows is
    computed before and after; if it differs, everything is undone.

    Returns:
        whether a batch is one sequence with a shared prefix, and the number of faster modules, by kind.
    """
    keep_freed_memory()
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    lengths = [len(example.input_ids) for example in examples]
    few = pick(examples, sorted(range(len(examples)), key=lengths.__getitem__)[-4:])
    plain = compute_loss(model, lay_out(few, pad_id, share_prefix=False))
    usual_attention = base.config._attn_implementation
    share_prefix = can_share_prefix(base)
    if share_prefix:
        use_shared_prefix(base)
    modules = speed_up(model)
    fast = compute_loss(model, lay_out(few, pad_id, share_prefix))
    # bfloat16 keeps three digits; a wrong attention changes the first. Processes on different machines may
    # find different losses, and must do the same.
    if all_agree(abs(fast - plain) <= 0.02 * abs(plain) + 0.01):
        return share_prefix, modules
    logger.warning(
        "the faster training code changes the loss of this model (%.4f instead of %.4f): "
        "training without it, more slowly",
        fast,
        plain,
    )
    slow_down(model)
    base.set_attn_implementation(usual_attention)
    return False, {}
