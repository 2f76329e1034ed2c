"""Write a model as GGUF, read the file back, and compare it with the model."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.common.chat.template import render_whole
from stages.common.errors import InputError
from stages.common.gguf.architectures import find_architecture
from stages.common.gguf.model import check_tensors, write_gguf
from stages.common.gguf.vocabulary import count_equal, read_gguf_vocabulary, read_vocabulary
from stages.common.logs import show_progress
from stages.common.records import Row


def write_checked(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    quantization: str,
    name: str,
    path: Path,
    logger: logging.Logger,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Write the model as GGUF, read it back and compare; return the evidence and the speed.

    Args:
        rows: whose token ids are compared.

    Raises:
        InputError: GGUF cannot carry this model, or what was written is not this model.
    """
    from gguf import GGUFReader

    logging.getLogger("gguf").setLevel(logging.WARNING)  # else: the byte order, and a name that soon changes
    vocabulary = read_vocabulary(tokenizer, model.get_input_embeddings().num_embeddings)
    start = time.perf_counter()
    write_gguf(
        path,
        model,
        vocabulary,
        quantization,
        name,
        lambda done, total: show_progress(logger, done, total, "tensors written"),
    )
    written_s = time.perf_counter() - start
    reader = GGUFReader(path)
    tensors = check_tensors(reader, model, path)
    found = read_gguf_vocabulary(reader)
    if found != vocabulary:
        raise InputError(
            f"{path} contains another vocabulary than the one written", "run again: dvc repro export"
        )
    texts = (render_whole(tokenizer, row.messages, row.tools) for row in rows)
    equal = count_equal(found, tokenizer, texts, path)
    if equal < len(rows):
        logger.warning(
            "%d of %d texts have other tokens in llama.cpp, which does not normalise Unicode (NFC)",
            len(rows) - equal,
            len(rows),
        )
    evidence = {
        "architecture": find_architecture(model.config).name,
        "bytes": path.stat().st_size,
        "pre_tokenizer": vocabulary.pre,
        "quantization": quantization,
        "tensor_errors": {kind: float(f"{error:.3g}") for kind, error in tensors.errors.items()},
        "tensors": sum(tensors.types.values()),
        "tensors_by_type": tensors.types,
        "tokens_compared": len(rows),
        "tokens_equal": equal,
        "vocabulary": len(vocabulary.tokens),
    }
    size_mib = path.stat().st_size / 2**20
    return evidence, {"gguf_mib_per_s": round(size_mib / written_s, 1), "gguf_write_s": round(written_s, 2)}
