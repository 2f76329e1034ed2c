"""The modules of a model that get an adapter, and whether they can have one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from stages.common.errors import InputError

if TYPE_CHECKING:
    from peft import LoraConfig

ALL_LINEAR = "all-linear"
_LINEAR = ("Linear", "Conv1D")  # GPT-2's linear layers are of the second class


def configure_lora(
    model: Any, method: str, rank: int, alpha: float, dropout: float, targets: str | Sequence[str]
) -> LoraConfig:
    """Return peft's settings of an adapter of lora or a relative for a base model."""
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=_match_other_parts(model),
        use_rslora=method == "rslora",
        use_dora=method == "dora",
        task_type="CAUSAL_LM",
    )


def _match_other_parts(model: Any) -> str | None:
    """Return a pattern of the modules that read no text, such as pictures; None where all do.

    Rows are text: an adapter there would never be trained.
    """
    if model.config.get_text_config() is model.config:
        return None
    decoder = next(name for name, module in model.named_modules() if module is model.get_decoder())
    return rf"(?!{re.escape(decoder)}\.).*"


def check_targets(model: Any, targets: str | Sequence[str]) -> None:
    """Check that every name of `finetune.target_modules` is one of the model's, as peft reads names.

    peft stops only if it finds none of them: with one name misspelt it would train the others.

    Raises:
        InputError: with each name that the model does not have, and the nearest one that it has; there is no
            name, or one is of a module that can have no adapter.
    """
    if targets == ALL_LINEAR:
        return
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(targets, str):
        chosen = [name for name in names if re.fullmatch(targets, name)]
        if not chosen:
            raise _absent(f"the base model has no module that matches {targets!r}", model)
    else:
        if not targets:
            raise _absent("finetune.target_modules is empty", model)
        chosen = _choose(names, targets, model)
    _check_matrices(model, chosen)
    _check_not_tied(model, chosen)


def _choose(names: Sequence[str], targets: Sequence[str], model: Any) -> list[str]:
    absent = [one for one in targets if not any(n == one or n.endswith(f".{one}") for n in names)]
    if absent:
        known = sorted({name.rpartition(".")[2] for name in names})
        near = [get_close_matches(one, known, 1) for one in absent]
        shown = [
            f"{one} (nearest: {found[0]})" if found else one for one, found in zip(absent, near, strict=True)
        ]
        raise _absent(f"the base model has no module {', '.join(shown)}", model)
    return [n for n in names if any(n == one or n.endswith(f".{one}") for one in targets)]


def check_experts(model: Any, targets: str | Sequence[str], method: str, dropout: float) -> None:
    """Check that the experts of a mixture can have the adapter, if it has them.

    peft adapts the matrices of all experts, which are one tensor, as a whole.

    Raises:
        InputError: it would have to drop inputs, or to scale outputs.
    """
    if targets != ALL_LINEAR or not (dropout or method == "dora"):
        return
    wanted = "finetune.method: dora" if method == "dora" else f"finetune.dropout: {dropout:g}"
    if experts := list_experts(model):
        raise InputError(
            f"{wanted} is not possible for experts, whose matrices are one tensor, such as {experts[0]}",
            "set finetune.method: lora and finetune.dropout: 0, or finetune.target_modules to a list of "
            "other modules, such as [q_proj, k_proj, v_proj, o_proj]",
        )


def list_experts(model: Any) -> list[str]:
    """Return the names of the matrices of a mixture's experts, those of all experts in one tensor."""
    return [name for name, weight in model.named_parameters() if "expert" in name and weight.dim() == 3]


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


def _check_matrices(model: Any, names: Sequence[str]) -> None:
    """Check that each of these modules has a matrix, next to which an adapter can be.

    Raises:
        InputError: with the first one that has none: a norm, or a module of others.
    """
    for name in names:
        if not any(weight.dim() > 1 for weight in model.get_submodule(name).parameters(recurse=False)):
            raise _absent(f"finetune.target_modules has {name}, which has no matrix of its own", model)


def _check_not_tied(model: Any, names: Sequence[str]) -> None:
    """Check that no adapter is of weights that two layers share.

    It is trained in one of them and merged into both, so what is served would not be what was trained
    (huggingface/peft issue 2777).

    Raises:
        InputError: with the name of the layer.
    """
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if output is None or output.weight is not embedding.weight:
        return
    tied = [name for name in names if model.get_submodule(name) in (embedding, output)]
    if tied:
        raise InputError(
            f"finetune.target_modules has {tied[0]}, and the embedding of the base model is its output "
            "layer, too: an adapter of one of them would change both where it is merged",
            "take it out, or train the embedding itself: finetune.method: partial with "
            f"finetune.trained_modules: [{_find_name(model, embedding)}]",
        )


def _find_name(model: Any, wanted: Any) -> str:
    return next(str(name) for name, module in model.named_modules() if module is wanted)


def _absent(what: str, model: Any) -> InputError:
    linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if type(m).__name__ in _LINEAR})
    return InputError(
        f"{what}; its linear modules are {', '.join(linear) or 'none'}",
        f"correct finetune.target_modules, or set it to {ALL_LINEAR}",
    )
