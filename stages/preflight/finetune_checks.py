"""Check before the costly stages what `finetune` would refuse: the method, the adapter to start from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.common.errors import InputError
from stages.common.model.adapter import check_base, check_weights_file, read_initial_adapter
from stages.common.model.targets import ALL_LINEAR, check_rank, check_targets


def find_method_problems(config: Any, rank: int, targets: str | Sequence[str]) -> list[InputError]:
    """Return why the model of a configuration cannot be trained with an adapter; its weights are not read."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return [
            InputError(
                f"the base model is of the type {config.model_type}, which transformers does not load as a "
                "causal language model",
                "choose a decoder for text with a chat template (fetch_base in params.yaml)",
            )
        ]
    try:
        check_rank(getattr(config.get_text_config(), "hidden_size", None), rank)
        if targets != ALL_LINEAR:
            with torch.device("meta"):
                check_targets(AutoModelForCausalLM.from_config(config), targets)
    except InputError as error:
        return [error]
    return []


def find_adapter_problems(folder: str | None, base_sha256: str | None) -> list[InputError]:
    """Return why training cannot start from the adapter in a folder; none where there is no adapter."""
    try:
        initial = read_initial_adapter(Path(folder)) if folder else None
        if initial:
            check_base(initial, str(base_sha256))
            check_weights_file(initial)
    except InputError as error:
        return [error]
    return []
