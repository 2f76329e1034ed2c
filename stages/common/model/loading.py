"""Loading the base model, its tokenizer and the tuned adapter, on the device that the machine has."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.common.errors import InputError
from stages.common.model.adapter import (
    HEAD,
    PEFT,
    check_weights_file,
    count_virtual_tokens,
    find_files,
    read_settings,
)
from stages.common.model.label_head import put_head
from stages.common.model.replaced import put_weights, read_weights
from stages.common.model.virtual_tokens import check_shape, has_virtual_tokens, read_behind
from stages.common.storage.hub import list_weight_files

if TYPE_CHECKING:
    import torch

MAX_REASON_CHARS = 300  # of a library's message in ours: it may list every tensor


def pick_device() -> torch.device:
    """Return the GPU if there is one (CUDA, or Metal on Apple silicon), else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(device: torch.device, wanted: str = "auto") -> torch.dtype:
    """Return bfloat16 where the machine computes in it natively, else float32.

    On a CPU without AVX512-BF16 or AMX, bfloat16 is emulated and slower than float32. So it is on the first
    Apple silicon (M1), and torch does not report which one it runs on: Metal gets float32.

    Args:
        wanted: `auto`, `bfloat16` or `float32`.
    """
    import torch

    if wanted != "auto":
        return torch.bfloat16 if wanted == "bfloat16" else torch.float32
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        native = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a model folder, with a padding token."""
    _check_folder(folder)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def count_context_tokens(config: Any, virtual_tokens: int = 0) -> int | None:
    """Return the length of a model's context in tokens, prompt and answer together; None if it has no limit.

    A sliding window counts as the whole context: within it, engines with and without windows agree.

    Args:
        virtual_tokens: learned ones before every text, which take positions, too.
    """
    whole = getattr(config.get_text_config(), "max_position_embeddings", None)
    window = getattr(config.get_text_config(), "sliding_window", None)
    return min(int(whole), int(window or whole)) - virtual_tokens if whole else None


def read_position_limit(config: Any, virtual_tokens: int = 0) -> int | None:
    """Return how many positions of text a model has; None if it has no limit."""
    whole = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(whole) - virtual_tokens if whole else None


def limit_length(max_length: int, config: Any, virtual_tokens: int = 0) -> int:
    """Return the most tokens of a training row: `max_length`, or the model's positions if they are fewer."""
    positions = read_position_limit(config, virtual_tokens)
    return max_length if positions is None else min(max_length, positions)


def read_config(folder: Path) -> Any:
    """Return the configuration of the model in a folder."""
    from transformers import AutoConfig

    _check_folder(folder)
    return AutoConfig.from_pretrained(folder, local_files_only=True)


def count_parameters(base: Path) -> int:
    """Return the number of weights in the safetensors files of a model, from their headers."""
    return sum(read_weight_sizes(base))


def read_weight_sizes(base: Path) -> list[int]:
    """Return the number of weights of each tensor in the safetensors files of a model, from their headers."""
    from safetensors import safe_open

    sizes = []
    for path in list_weight_files(base):
        with safe_open(path, framework="numpy") as file:
            sizes += [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    return sizes


def is_stored_in_bfloat16(base: Path) -> bool:
    """Return whether all weights in the safetensors files of a model are bfloat16, from their headers."""
    from safetensors import safe_open

    kinds = set()
    for path in list_weight_files(base):
        with safe_open(path, framework="numpy") as file:
            kinds |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return kinds == {"BF16"}


def make_empty(config: Any) -> Any:
    """Return the model of a configuration with the names and shapes of its weights, and no values."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def load_base(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Load the base model of a model folder, in evaluation mode."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    _check_folder(folder)
    logging.disable_progress_bar()  # a bar over a second of loading, in every log
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.to(device).eval()


def load_tuned(base: Path, adapter: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Load the base model with its adapter merged into the weights, in evaluation mode.

    Virtual tokens are no weights of it: they stay before every text (see `virtual_tokens`).
    """
    from peft import PeftModel

    tuned = add_adapter(load_base(base, dtype, device), adapter)
    if isinstance(tuned, PeftModel) and not has_virtual_tokens(tuned):
        return tuned.merge_and_unload().eval()
    return tuned


def add_adapter(model: Any, adapter: Path) -> Any:
    """Return the base model with an adapter of either format, not merged, in evaluation mode.

    Raises:
        InputError: the folder has no adapter or a damaged one, or it is of another base model.
    """
    from peft import PeftModel

    files = find_files(adapter)
    if files is None or not (adapter / files.config).exists():
        raise InputError(f"{adapter} contains no adapter", "run the stage that writes it: dvc repro finetune")
    check_weights_file(adapter, "run the stage that writes it: dvc repro finetune")
    if files is PEFT:
        if count_virtual_tokens(adapter):
            check_shape(model.config, read_settings(adapter), adapter)
            return read_behind(PeftModel.from_pretrained(model, adapter).eval())
        return _load_lora(model, adapter)
    if (settings := read_settings(adapter))["method"] == HEAD:
        put_head(model, settings["labels"])
    put_weights(model, read_weights(adapter / files.weights), adapter / files.weights)
    return model.eval()


def _load_lora(model: Any, adapter: Path) -> Any:
    """Return the base model with an adapter of lora or a relative, not merged, in evaluation mode.

    peft would leave out what it does not find on either side: a part of the adapter, or of the model.

    Raises:
        InputError: the base model has not the modules of the adapter, or in another shape.
    """
    from peft import PeftModel

    try:
        tuned = PeftModel.from_pretrained(model, adapter)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, RuntimeError) and "size mismatch" not in str(error):
            raise
        raise _misfit(adapter, str(error).strip()[:MAX_REASON_CHARS]) from None
    # Loaded again: only here peft tells what it has not found.
    mapping = getattr(model, "_checkpoint_conversion_mapping", {})
    report = tuned.load_adapter(adapter, "default", key_mapping=mapping)
    if report.missing_keys:
        raise _misfit(adapter, f"it has nothing for {report.missing_keys[0]}")
    if report.unexpected_keys:
        raise _misfit(adapter, f"the base model has no place for {report.unexpected_keys[0]}")
    return tuned.eval()


def _misfit(adapter: Path, why: str) -> InputError:
    return InputError(
        f"the adapter in {adapter} does not fit the base model: {why}",
        "fetch the base model that it was trained on, or train again: dvc repro finetune",
    )


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} contains no model", "run the stage that writes it: dvc repro fetch_base")
