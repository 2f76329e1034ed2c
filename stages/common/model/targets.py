"""The modules of a model that get an adapter, and whether they can have one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from stages.common.errors import InputError

ALL_LINEAR = "all-linear"
_LINEAR = ("Linear", "Conv1D")  # GPT-2's linear layers are of the second class


def check_targets(model: Any, targets: str | Sequence[str]) -> None:
    """Check that every name of `finetune.target_modules` is one of the model's, as peft reads names.

    peft stops only if it finds none of them: with one name misspelt it would train the others.

    Raises:
        InputError: with each name that the model does not have, and the nearest one that it has.
    """
    if targets == ALL_LINEAR:
        return
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(targets, str):
        if not any(re.fullmatch(targets, name) for name in names):
            raise _absent(f"the base model has no module that matches {targets!r}", model)
        return
    absent = [one for one in targets if not any(n == one or n.endswith(f".{one}") for n in names)]
    if absent:
        known = sorted({name.rpartition(".")[2] for name in names})
        near = [get_close_matches(one, known, 1) for one in absent]
        shown = [
            f"{one} (nearest: {found[0]})" if found else one for one, found in zip(absent, near, strict=True)
        ]
        raise _absent(f"the base model has no module {', '.join(shown)}", model)


def check_rank(hidden_size: int | None, rank: int) -> None:
    """Check that an adapter is smaller than what it changes.

    Raises:
        InputError: the rank is above the width of the model.
    """
    if hidden_size and rank > hidden_size:
        raise InputError(
            f"finetune.rank is {rank}, and the base model's layers are {hidden_size} wide: a change of their "
            "weights has no higher rank, and the adapter would be larger than they are",
            f"set finetune.rank to {hidden_size} or less (8 to 64 is usual)",
        )


def _absent(what: str, model: Any) -> InputError:
    linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if type(m).__name__ in _LINEAR})
    return InputError(
        f"{what}; its linear modules are {', '.join(linear) or 'none'}",
        f"correct finetune.target_modules, or set it to {ALL_LINEAR}",
    )
