"""Select and load the engine for a model on this machine."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from services.engines.protocol import Engine, EngineError
from services.engines.support import check_engine
from stages.common.errors import InputError
from stages.common.model.adapter import HEAD, VLLM_METHODS, read_settings
from stages.common.model.draft_corpus import CORPUS, read_corpus

if TYPE_CHECKING:
    from stages.common.params.services import EngineSettings

logger = logging.getLogger(__name__)


class ModelFiles(Protocol):
    """The files of a model, of which each engine reads its own format; see `services.versions`."""

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


def load_engine(files: ModelFiles, tokenizer: Any, settings: EngineSettings, drain_s: float = 0.0) -> Engine:
    """Load a model into the engine for this machine.

    Args:
        drain_s: time that a process of the engine has to finish its answers after SIGTERM.

    Raises:
        InputError: the configured engine cannot run here, or not with these files.
    """
    kind = choose_kind(
        settings.kind, files.tokenizer, files.gguf, files.base, settings.gpus, adapter=files.adapter
    )
    logger.info("loading %s %s into the engine %s", files.name, files.version, kind)
    common: dict[str, Any] = {
        "max_running": settings.max_running,
        "max_waiting": settings.max_waiting,
        "context_tokens": settings.context_tokens,
    }
    if files.gguf is not None and kind in ("paged", "openvino"):
        common |= {"threads": settings.threads, "kv_cache_mib": settings.kv_cache_mib}
        return _load_on_openvino(
            kind, files.gguf, files.tokenizer, tokenizer, common, fall_back=settings.kind == "auto"
        )
    assert files.base is not None
    if kind == "vllm":
        from services.engines.vllm import VllmEngine

        common |= {"gpu_memory": settings.gpu_memory, "drain_s": drain_s}
        return VllmEngine(files.base, files.adapter, tokenizer, **common)
    from services.engines.transformers import LabelEngine, TransformersEngine

    # A GPU that is not reserved is left to other processes, such as a training.
    common |= {"threads": settings.threads, "device": "auto" if settings.gpus or not _count_gpus() else "cpu"}
    method = read_settings(files.adapter)["method"] if files.adapter is not None else None
    engine = LabelEngine if method == HEAD else TransformersEngine
    return engine(files.base, files.adapter, tokenizer, **common)


def _load_on_openvino(
    kind: str, gguf: Path, folder: Path, tokenizer: Any, common: dict[str, Any], fall_back: bool
) -> Engine:
    from services.engines.openvino import OpenvinoEngine
    from services.engines.paged.engine import PagedEngine

    if kind == "paged":
        try:
            return PagedEngine(gguf, tokenizer, examples=read_corpus(folder / CORPUS), **common)
        except EngineError as error:
            if not fall_back:
                raise InputError(
                    f"the engine paged does not start: {error}",
                    "set services.engine.kind: openvino in params.yaml",
                ) from None
            logger.warning("not using the engine paged: %s", error)
    return OpenvinoEngine(gguf, folder / "config.json", tokenizer, **common)


def check_gpus(settings: EngineSettings) -> None:
    """Raise InputError if more GPUs are configured than torch sees."""
    seen = _count_gpus()
    if settings.gpus > seen:
        raise InputError(
            f"services.engine.gpus is {settings.gpus}, and torch sees {seen or 'no'} GPUs",
            "set services.engine.gpus: 0 in params.yaml to serve on the CPU, or run on a machine with GPUs; "
            "torch needs its CUDA build and NVIDIA's driver to see them",
        )


def choose_kind(
    wanted: str,
    folder: Path,
    gguf: Path | None,
    base: Path | None,
    gpus: int,
    adapter: Path | None = None,
) -> str:
    """Return the engine for these files on this machine: `vllm`, `paged`, `openvino` or `transformers`.

    `auto` takes a GPU only if one is reserved: by default a training has it.

    Args:
        wanted: one of them, or `auto`.
        folder: has the model's `config.json`.
        gguf, base: the model in each format; None without it.
        gpus: that are reserved.
        adapter: folder of the adapter; None for the base model alone.

    Raises:
        InputError: the configured engine cannot run here, or no engine can.
    """
    reasons = {
        "vllm": _reason_against_vllm(base, adapter),
        "paged": _reason_against_paged(folder, gguf),
        "openvino": _reason_against_openvino(folder, gguf),
        "transformers": None if base is not None else "the model's safetensors are missing",
    }
    if wanted != "auto":
        if (reason := reasons[wanted]) is not None:
            raise InputError(
                f"the engine {wanted} (services.engine.kind) cannot run: {reason}",
                "set services.engine.kind: auto in params.yaml, which picks an engine that can run here",
            )
        return wanted
    order = ("vllm", "transformers", "paged", "openvino") if gpus else ("paged", "openvino", "transformers")
    if not gpus and (seen := _count_gpus()):
        logger.info("the CPU computes: services.engine.gpus is 0, though torch sees %d", seen)
    for kind in order:
        if reasons[kind] is None:
            if gpus and kind != "vllm":
                logger.warning("the GPU is served by %s, which is several times slower than vLLM", kind)
            return kind
        logger.info("not using the engine %s: %s", kind, reasons[kind])
    raise InputError(
        "no engine can serve this model: " + "; ".join(f"{kind}: {reasons[kind]}" for kind in order),
        "export the model again: dvc repro export",
    )


def _reason_against_vllm(base: Path | None, adapter: Path | None) -> str | None:
    if not _count_gpus():
        return "torch sees no GPU, which vLLM needs"
    if find_spec("vllm") is None:
        return "vLLM is not installed (pip install 'perennial[gpu]')"
    if base is None:
        return "the model's safetensors are missing"
    if adapter is None:
        return None
    if (method := read_settings(adapter)["method"]) not in VLLM_METHODS:
        return f"vLLM loads adapters of the methods {', '.join(VLLM_METHODS)}, and this is one of {method}"
    return check_engine("vllm", base, has_gguf=False)


def _reason_against_paged(folder: Path, gguf: Path | None) -> str | None:
    if find_spec("openvino") is None:
        return "OpenVINO is not installed (pip install 'perennial[serve]')"
    return check_engine("paged", folder, gguf is not None)


def _reason_against_openvino(folder: Path, gguf: Path | None) -> str | None:
    if find_spec("openvino_genai") is None:
        return "OpenVINO is not installed (pip install 'perennial[serve]')"
    return check_engine("openvino", folder, gguf is not None)


def _count_gpus() -> int:
    """Return the number of GPUs that torch sees, which CUDA_VISIBLE_DEVICES can limit.

    NVIDIA's management library counts them. `is_available` would initialise CUDA in this process.
    """
    import torch

    return torch.cuda.device_count()
