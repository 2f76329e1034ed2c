"""Which engine a machine gets, and plain refusals where it cannot have the one that was asked for."""

from __future__ import annotations

import json
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from services.engines.paged.weights import why_not_llama
from services.engines.protocol import Engine, EngineError
from stages.common.errors import InputError
from stages.common.examples import read_examples

if TYPE_CHECKING:
    from stages.common.params.services import EngineSettings

log = logging.getLogger(__name__)


class ModelFiles(Protocol):
    """The files of a model, of which each engine reads its own form; see `services.versions`."""

    @property
    def name(self) -> str:
        """Return the model's name."""
        ...

    @property
    def version(self) -> str:
        """Return its version."""
        ...

    @property
    def tokenizer(self) -> Path:
        """Return the folder of its tokenizer and `config.json`."""
        ...

    @property
    def gguf(self) -> Path | None:
        """Return the merged model, or None."""
        ...

    @property
    def base(self) -> Path | None:
        """Return the folder of the base model's safetensors, or None."""
        ...

    @property
    def adapter(self) -> Path | None:
        """Return the folder of the adapter, or None."""
        ...


# Architectures (`model_type`) whose GGUF OpenVINO builds a model from.
OPENVINO_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def load_engine(files: ModelFiles, tokenizer: Any, settings: EngineSettings) -> Engine:
    """Load a version of the model into the engine that suits the machine.

    Raises:
        InputError: the engine asked for cannot run here, or not with these files.
    """
    kind = choose_kind(settings.kind, files.tokenizer, files.gguf, files.base)
    log.info("Loading %s %s into the engine %s", files.name, files.version, kind)
    common: dict[str, Any] = {
        "max_running": settings.max_running,
        "max_waiting": settings.max_waiting,
        "context_tokens": settings.context_tokens,
    }
    if files.gguf is not None and kind in ("paged", "openvino"):
        common |= {"threads": settings.threads, "kv_cache_mib": settings.kv_cache_mib}
        return _on_openvino(
            kind, files.gguf, files.tokenizer, tokenizer, common, fall_back=settings.kind == "auto"
        )
    assert files.base is not None
    if kind == "vllm":
        from services.engines.vllm import VllmEngine

        return VllmEngine(files.base, files.adapter, tokenizer, **common)
    from services.engines.transformers import TransformersEngine

    return TransformersEngine(files.base, files.adapter, tokenizer, threads=settings.threads, **common)


def _on_openvino(
    kind: str, gguf: Path, folder: Path, tokenizer: Any, common: dict[str, Any], fall_back: bool
) -> Engine:
    from services.engines.openvino import OpenvinoEngine
    from services.engines.paged.engine import PagedEngine

    if kind == "paged":
        try:
            return PagedEngine(gguf, tokenizer, examples=read_examples(folder / "examples.npz"), **common)
        except EngineError as error:
            if not fall_back:
                raise InputError(
                    f"the engine paged does not start: {error}",
                    "set services.engine.kind: openvino in params.yaml",
                ) from None
            log.warning("Not the engine paged: %s", error)
    return OpenvinoEngine(gguf, folder / "config.json", tokenizer, **common)


def check_gpus(settings: EngineSettings) -> None:
    """Raise InputError if more GPUs are asked for than torch sees."""
    seen = _gpus_seen()
    if settings.gpus > seen:
        raise InputError(
            f"a GPU was asked for (services.engine.gpus: {settings.gpus}) and torch sees {seen or 'none'}",
            "set services.engine.gpus: 0 in params.yaml to answer on the CPU, or run where the GPUs are; "
            "torch sees one only with its CUDA build and NVIDIA's driver",
        )


def choose_kind(wanted: str, folder: Path, gguf: Path | None, base: Path | None) -> str:
    """Return the engine for these files on this machine: `vllm`, `paged`, `openvino` or `transformers`.

    Args:
        wanted: one of them, or `auto`.
        folder: holds the model's `config.json`.
        gguf, base: the model's forms; None where there is none.

    Raises:
        InputError: the engine asked for cannot run here, or no engine can.
    """
    reasons = {
        "vllm": _against_vllm(base),
        "paged": _against_paged(folder, gguf),
        "openvino": _against_openvino(folder, gguf),
        "transformers": None if base is not None else "the model's safetensors are not there",
    }
    if wanted != "auto":
        if (reason := reasons[wanted]) is not None:
            raise InputError(
                f"services.engine.kind: {wanted} was asked for, and {reason}",
                "set services.engine.kind: auto in params.yaml, which takes what this machine can run",
            )
        return wanted
    order: tuple[str, ...] = ("vllm", "transformers", "paged", "openvino")
    if not _gpus_seen():
        order = ("paged", "openvino", "transformers")
    for kind in order:
        if reasons[kind] is None:
            return kind
        log.info("Not the engine %s: %s", kind, reasons[kind])
    raise InputError(
        "no engine can serve this model: " + "; ".join(f"{kind}: {reasons[kind]}" for kind in order),
        "make the model anew: dvc repro export",
    )


def _against_vllm(base: Path | None) -> str | None:
    if not _gpus_seen():
        return "torch sees no GPU, without which vLLM does not run"
    if find_spec("vllm") is None:
        return "vLLM is not installed (pip install 'perennial[gpu]')"
    return None if base is not None else "the model's safetensors are not there"


def _against_paged(folder: Path, gguf: Path | None) -> str | None:
    if find_spec("openvino") is None:
        return "OpenVINO is not installed (pip install 'perennial[serve]')"
    if gguf is None:
        return "the model has no GGUF (export.gguf in params.yaml)"
    return why_not_llama(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def _against_openvino(folder: Path, gguf: Path | None) -> str | None:
    if find_spec("openvino_genai") is None:
        return "OpenVINO is not installed (pip install 'perennial[serve]')"
    if gguf is None:
        return "the model has no GGUF (export.gguf in params.yaml)"
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    if kind not in OPENVINO_TYPES:
        return f"it reads no GGUF of the architecture {kind!r} (it reads {', '.join(OPENVINO_TYPES)})"
    return None


def _gpus_seen() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
