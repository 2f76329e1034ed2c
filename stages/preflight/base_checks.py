"""Check before training what would stop the pipeline after it: base model, tokenizer, licences, disk."""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from services.engines.support import check_engine, pick_engine
from stages.common.chat.day import writes_the_day_of_use
from stages.common.chat.template import end_of_turn_ids, render_whole
from stages.common.errors import InputError
from stages.common.gguf.architectures import find_architecture
from stages.common.gguf.model import count_block, find_uneven_tensor, list_tensors
from stages.common.gguf.quantization import HEALED, VARIANTS
from stages.common.gguf.vocabulary import count_equal, read_vocabulary
from stages.common.licenses import to_spdx
from stages.common.model.blocks import check_shrinkable
from stages.common.model.loading import make_empty
from stages.common.params.compress import Compress
from stages.common.params.stages import Export
from stages.common.records import Row

# Bytes of a weight in the exported file; the block formats with their scales.
BYTES_PER_WEIGHT = {"f16": 2.0, "bf16": 2.0, "q8_0": 1.07, "q4_0": 0.6, "q4_k": 0.6}
SPARE_BYTES = 256 << 20  # adapter, checkpoints, reports


def count_embedding_rows(config: Any) -> int:
    """Return the number of tokens that the model knows."""
    return int(config.get_text_config().vocab_size)


def find_template_problems(tokenizer: Any) -> list[InputError]:
    """Return why no model can be taught with the chat template."""
    problems = _collect([lambda: end_of_turn_ids(tokenizer)])
    if writes_the_day_of_use(str(tokenizer.chat_template)):
        problems.append(
            InputError(
                "the chat template writes the date by strftime_now in another way than "
                "strftime_now('a format'): servers would write another day than the one learned",
                "write the format into the call in the base's chat_template.jinja, or the date itself",
            )
        )
    return problems


def find_unknown_tokens(tokenizer: Any, embedding_rows: int, exports_gguf: bool) -> list[InputError]:
    """Return the tokens that every run needs and the model does not know.

    A GGUF file lists all tokens. Without one, only those matter that end or fill a sequence; a row with
    another is excluded.
    """
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= embedding_rows}
    if not exports_gguf:
        needed = {tokenizer.eos_token_id, tokenizer.pad_token_id}
        beyond = {number: token for number, token in beyond.items() if number in needed}
    if not beyond:
        return []
    shown = ", ".join(f"{token} ({number})" for number, token in sorted(beyond.items())[:5])
    return [
        InputError(
            f"the tokenizer has {len(beyond)} tokens that the model's embedding of {embedding_rows} rows "
            f"does not have: {shown}",
            "choose a base model whose tokenizer fits it, or remove the added tokens from its tokenizer.json "
            "and tokenizer_config.json; if no row needs them, set export.gguf: false",
        )
    ]


def find_export_problems(config: Any) -> list[InputError]:
    """Return why the model cannot become a GGUF file; its tensors are listed without their values."""
    problems = _collect([lambda: find_architecture(config)])
    if not problems:
        problems = _collect([lambda: _list_tensor_names(config)])
    return problems


def find_token_problems(tokenizer: Any, embedding_rows: int, rows: Iterable[Row]) -> list[InputError]:
    """Return why a GGUF cannot hold the tokenizer, or which row would have other tokens in llama.cpp.

    A tokenizer may strip the blanks after its control tokens, as Phi 3's does and no GGUF can say.
    """
    if max(tokenizer.get_vocab().values()) >= embedding_rows:  # a problem of its own
        return []

    def compare() -> None:
        vocabulary = read_vocabulary(tokenizer, embedding_rows)
        texts = (render_whole(tokenizer, row.messages, row.tools) for row in rows)
        count_equal(vocabulary, tokenizer, texts, Path("the GGUF export"))

    return _collect([compare])


def find_engine_problems(kinds: Mapping[str, str], base: Path, exports_gguf: bool) -> list[InputError]:
    """Return which engines of params.yaml cannot compute this base model.

    Args:
        kinds: by the parameter that names the engine.
    """
    return [
        InputError(f"{name} is {kind}, and {reason}", f"set {name}: auto")
        for name, kind in kinds.items()
        if (reason := check_engine(kind, base, exports_gguf)) is not None
    ]


def find_variant_problems(
    variants: Sequence[str], wanted_engine: str, base: Path, config: Any
) -> list[InputError]:
    """Return why smaller models cannot be made of this base model, or not be measured here.

    Args:
        variants: `compress.variants`.
        wanted_engine: `ask_base.engine`.
        base: folder of the base model.
        config: of the base model, which has a GGUF export.
    """
    if not variants:
        return []
    problems = []
    if pick_engine(wanted_engine, base, exports_gguf=True) != "paged":
        problems.append(
            InputError(
                f"compress.variants has {', '.join(variants)}, which the engine paged measures, and it does "
                "not run here: the machine has a GPU, or no OpenVINO, or the base model is of another kind",
                "set compress.variants: [] (docs/how-to/compress.md has the ways for a GPU)",
            )
        )
    for name in variants:
        quantization = VARIANTS[name]
        if quantization is None:
            problems += _collect([partial(check_shrinkable, config, name, make_empty(config))])
        elif uneven := find_uneven_tensor(config, quantization):
            problems.append(
                InputError(
                    f"compress.variants has {name}, which needs rows of a multiple of "
                    f"{count_block(quantization)} weights, and the base model has {uneven}",
                    f"take {name} out of compress.variants{', or use int4' if name == 'q4_k' else ''}",
                )
            )
    return problems


def _list_tensor_names(config: Any) -> list[str]:
    return [tensor.name for tensor in list_tensors(make_empty(config))]


def find_license_problems(
    rows: Iterable[Row], allowed: Iterable[str], model_license: str, base_license: str | None
) -> list[InputError]:
    """Return the licences that the model card would refuse after training."""
    known = {to_spdx(name) for name in allowed}
    lines = []
    sources: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        sources[row.license][row.source] += 1
    for license, by_source in sorted(sources.items()):
        named = ", ".join(sorted(by_source))
        if to_spdx(license) is None:
            lines.append(f"{license!r} of {by_source.total()} rows from {named} is not an SPDX expression")
        elif to_spdx(license) not in known:
            lines.append(
                f"{license!r} of {by_source.total()} rows from {named} is not in validate.allowed_licenses"
            )
    stated = {"model_card.license": model_license, "the base model's licence": base_license}
    for what, one in stated.items():
        if one is not None and to_spdx(one) is None:
            lines.append(f"{one!r} ({what}) is not an SPDX expression")
    if not lines:
        return []
    return [
        InputError(
            "licences: " + "; ".join(lines),
            "correct the licence of the source (collect.sources), allow it in validate.allowed_licenses, or "
            "set fetch_base.license and model_card.license to SPDX ids such as apache-2.0",
        )
    ]


def count_needed_bytes(parameters: int, quantizations: Iterable[str], trained_bytes: int = 0) -> int:
    """Return the disk space that training, export and smaller models need.

    Args:
        quantizations: of the files that are written; none without a GGUF.
        trained_bytes: of checkpoints and the adapter, where `SPARE_BYTES` are too few for them.
    """
    exported = sum(parameters * BYTES_PER_WEIGHT[one] for one in quantizations)
    return int(exported) + max(SPARE_BYTES, trained_bytes)


def list_quantizations(export: Export, variants: Sequence[str]) -> list[str]:
    """Return the quantizations of the files that are written: of the export and of the smaller models."""
    if not export.gguf:
        return []
    return [export.quantization, *(VARIANTS[name] or export.quantization for name in variants)]


def count_healing_bytes(parameters: int, settings: Compress) -> int:
    """Return the disk space of the training that heals a smaller model, at most the whole model's.

    In float32: its weights before and after, three checkpoints of the weights and two moments, and the whole
    model if it teaches.
    """
    healed = any(name in HEALED for name in settings.variants) and settings.healing_rows != 0
    teacher = 1 if settings.healing_teacher_weight else 0
    return parameters * 4 * (1 + 3 * 3 + 1 + teacher) if healed else 0


def find_disk_problems(needed_bytes: int, folder: Path) -> list[InputError]:
    """Return whether the disk of a folder has less space than is needed."""
    free = shutil.disk_usage(folder).free
    if free >= needed_bytes:
        return []
    return [
        InputError(
            f"training and export need about {needed_bytes >> 20:,} MiB, and the disk of {folder.resolve()} "
            f"has {free >> 20:,} MiB left",
            "make room (dvc gc --workspace removes old outputs), or set export.quantization: q8_0 or q4_0",
        )
    ]


def _collect(checks: Sequence[Callable[[], object]]) -> list[InputError]:
    problems = []
    for check in checks:
        try:
            check()
        except InputError as error:
            problems.append(error)
    return problems
