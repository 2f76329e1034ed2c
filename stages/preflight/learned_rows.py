"""Check before the costly stages that `finetune.method` finds rows to learn from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.common.chat.fitting import encode_fitting, list_with_room, select_rows
from stages.common.errors import InputError
from stages.common.model.adapter import PREFERENCE_METHODS, InitialAdapter, read_initial_adapter
from stages.common.records import Row
from stages.common.spool import view

if TYPE_CHECKING:
    from stages.common.params.loading import Params


def find_learned_problems(
    params: Params, tokenizer: Any, train: Sequence[Row], limit: int
) -> list[InputError]:
    """Return why nothing would be learned: prompts without room for an answer, or rows known already.

    Args:
        limit: the most tokens of a prompt with its answer.
    """
    method = params.finetune.method
    try:
        if method == "grpo":
            fitting, _ = encode_fitting(tokenizer, train, limit)
            examples = view(fitting, lambda pair: pair[1])
            list_with_room(examples, len(train), limit, params.ask_base.max_new_tokens)
        elif method not in PREFERENCE_METHODS:
            initial = _read_start(params.finetune.warm_start_from)
            known = initial.read_trained_ids() if initial else frozenset()
            if known:
                select_rows(train, initial, known, params.finetune.replay_share, params.finetune.seed)
    except InputError as error:
        return [error]
    return []


def _read_start(folder: str | None) -> InitialAdapter | None:
    """Return the adapter to start from; None also for one that is refused elsewhere."""
    try:
        return read_initial_adapter(Path(folder)) if folder else None
    except InputError:
        return None
