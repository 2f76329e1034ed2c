"""The engines that run on this machine, over one tiny model whose weights are exact in GGUF's float16."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from services.engines.openvino import OpenvinoEngine
from services.engines.paged.engine import PagedEngine
from services.engines.transformers import TransformersEngine
from tests.tiny import make_model, make_tokenizer

MERGES = (("a", "b"), ("t", "h"))  # llama.cpp reads no vocabulary without merges


@dataclass(frozen=True)
class Tiny:
    folder: Path
    tokenizer: Any
    model: Any


@cache
def tiny() -> Tiny:
    """Return the model, whose logits lie far enough apart that rounding changes no choice."""
    from stages.common.gguf.model import write_gguf
    from stages.common.gguf.vocabulary import read_vocabulary

    folder = Path(mkdtemp(prefix="perennial-tiny-"))
    model = make_model(vocab_size=258 + len(MERGES), initializer_range=0.4)
    model = model.half().float()
    tokenizer = make_tokenizer(MERGES)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = model.config.vocab_size
    write_gguf(folder / "model.gguf", model, read_vocabulary(tokenizer, size), "f16", "tiny")
    return Tiny(folder, tokenizer, model)


def make_openvino(**settings: Any) -> OpenvinoEngine:
    made = tiny()
    settings = {"kv_cache_mib": 4, "threads": 1, **settings}
    return OpenvinoEngine(
        made.folder / "model.gguf",
        made.folder / "config.json",
        made.tokenizer,
        precision="float32",
        **settings,
    )


def make_paged(**settings: Any) -> PagedEngine:
    made = tiny()
    settings = {"kv_cache_mib": 4, "threads": 1, **settings}
    return PagedEngine(made.folder / "model.gguf", made.tokenizer, precision="float32", **settings)


def make_transformers(**settings: Any) -> TransformersEngine:
    made = tiny()
    return TransformersEngine(
        made.folder, None, made.tokenizer, device="cpu", precision="float32", **settings
    )


MAKERS = {"openvino": make_openvino, "paged": make_paged, "transformers": make_transformers}
