"""Which engine computes which architecture, from the `config.json` of a model, and which one is asked."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from stages.common.errors import InputError
from stages.common.model.loading import pick_device

logger = logging.getLogger(__name__)

EngineName = Literal["paged", "transformers"]

# Architectures (`model_type`) that the paged engine computes → their names in GGUF.
PAGED_TYPES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "smollm3": "smollm3",
    "granite": "granite",
    "olmo2": "olmo2",
    "gemma3_text": "gemma3",
}
# Those that have no LoRA in vLLM's own list of supported models.
WITHOUT_VLLM_ADAPTERS = ("gpt2", "gpt_neox")
# Those that OpenVINO GenAI can read from GGUF.
OPENVINO_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_PAGED_ROTATIONS = ("default", "llama3", "linear")


def check_engine(kind: str, folder: Path, has_gguf: bool) -> str | None:
    """Return why an engine computes the model of a folder on no machine; None if it does on some.

    What no GGUF can contain is not asked here: there is no file of such a model.

    Args:
        kind: as in `services.engine.kind`.
        folder: has the model's `config.json` and `tokenizer.json`.
        has_gguf: whether the model has, or will have, a GGUF file.
    """
    if kind not in ("paged", "openvino", "vllm"):
        return None
    if kind != "vllm" and not has_gguf:
        return "the model has no GGUF (export.gguf in params.yaml)"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if kind == "vllm":
        return check_vllm(config)
    return check_paged(config) if kind == "paged" else check_openvino(config) or _check_tokenizer(folder)


def check_vllm(config: Mapping[str, Any]) -> str | None:
    """Return why vLLM does not load adapters of an architecture; None if it does, or is not known not to."""
    if (found := config["model_type"]) in WITHOUT_VLLM_ADAPTERS:
        return f"vLLM loads no adapters of the architecture {found}"
    return None


def pick_engine(wanted: str, base: Path, exports_gguf: bool) -> EngineName:
    """Return which engine asks the base and the tuned model.

    Args:
        wanted: `auto`, `paged` or `transformers`.
        base: folder of the base model.
        exports_gguf: whether the tuned model will have a GGUF.

    Raises:
        InputError: `paged` is wanted and cannot compute this model here.
    """
    if wanted == "transformers":
        return "transformers"
    reason = _why_not_paged(base, exports_gguf)
    if reason is None:
        return "paged"
    if wanted == "paged":
        raise InputError(f"ask_base.engine is paged, and {reason}", "set ask_base.engine: auto")
    logger.info("transformers writes the answers: %s", reason)
    return "transformers"


def _why_not_paged(base: Path, exports_gguf: bool) -> str | None:
    if pick_device().type != "cpu":
        return "this machine has a GPU"
    if find_spec("openvino") is None:
        return "OpenVINO is not installed"
    if not exports_gguf:
        return "the tuned model has no GGUF (export.gguf: false)"
    return check_paged(json.loads((base / "config.json").read_text(encoding="utf-8")))


def check_paged(config: Mapping[str, Any]) -> str | None:
    """Return why the paged engine does not compute a model of this `config.json`; None if it does."""
    if config["model_type"] not in PAGED_TYPES:
        return describe_other(config["model_type"])
    if (rotation := _read_rotation(config)) not in _PAGED_ROTATIONS:
        return f"the paged engine does not compute positions scaled by {rotation!r}"
    return None


def describe_other(architecture: object) -> str:
    """Return that the paged engine does not compute an architecture, and what it does."""
    return f"the paged engine computes {', '.join(PAGED_TYPES)}, and this model is of {architecture!r}"


def check_openvino(config: Mapping[str, Any]) -> str | None:
    """Return why OpenVINO GenAI does not compute the GGUF of such a model; None if it does."""
    kind = config["model_type"]
    if kind not in OPENVINO_TYPES:
        return f"it cannot read GGUF files of the architecture {kind!r} (only {', '.join(OPENVINO_TYPES)})"
    # It would answer all the same, and wrongly: its reader skips the tensor that scales positions, and
    # leaves the biases of a Llama in the order of llama.cpp.
    if (rotation := _read_rotation(config)) != "default":
        return f"it does not compute positions scaled by {rotation!r}"
    if kind == "llama" and (config.get("attention_bias") or config.get("mlp_bias")):
        return "it does not compute a Llama with biases"
    return None


def _check_tokenizer(folder: Path) -> str | None:
    """Return why OpenVINO GenAI does not load the tokenizer of the folder's GGUF; None if it does."""
    path = folder / "tokenizer.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8"))["model"].get("byte_fallback"):
        return "it cannot read GGUF files with a tokenizer of SentencePiece"
    return None


def _read_rotation(config: Mapping[str, Any]) -> str:
    """Return how positions are scaled; Gemma 3 has one way for each kind of layer."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rope.get("full_attention", rope)
    return str(rope.get("rope_type", rope.get("type", "default")))
