"""Make the variants of a model: each a GGUF in a folder of its own, with what was done as evidence."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.common.artifacts import artifacts
from stages.common.chat.fitting import find_refused
from stages.common.chat.template import encode_example
from stages.common.chat.turns import unroll
from stages.common.gguf.checked import write_checked
from stages.common.gguf.quantization import HEALED, VARIANTS
from stages.common.logs import get_logger, show_progress
from stages.common.model.exported import GGUF
from stages.common.model.loading import (
    count_context_tokens,
    limit_length,
    load_tokenizer,
    load_tuned,
    read_config,
)
from stages.common.params.loading import Params
from stages.common.records import Row, read_rows
from stages.compress.gptq import fit_weights
from stages.compress.healing import heal_model
from stages.compress.shrinking import drop_blocks, drop_channels
from stages.compress.vocabulary import check_room, complete_tokenizer, cut_vocabulary

logger = get_logger("compress")

KEPT = ("bytes", "quantization", "tensors_by_type", "tensor_errors")


def make_variant(name: str, params: Params, folder: Path) -> dict[str, Any]:
    """Write the GGUF of a variant into a new folder, beside its tokenizer; return the evidence.

    A model of another shape gets its own `config.json`; the rest is the export's.
    """
    import torch

    base = artifacts("fetch_base")
    tokenizer = load_tokenizer(base)
    model = load_tuned(base, artifacts("finetune"), torch.float32, torch.device("cpu"))
    folder.mkdir()
    model, evidence = _change(name, model, tokenizer, params, folder)
    if VARIANTS[name] is None:
        model.config.save_pretrained(folder)
    complete_tokenizer(folder)
    quantization = VARIANTS[name] or params.export.quantization
    path = folder / GGUF
    found, _ = write_checked(
        model, load_tokenizer(folder), [], quantization, params.model_card.name, path, logger
    )
    return {key: found[key] for key in KEPT} | evidence


def _change(
    name: str, model: Any, tokenizer: Any, params: Params, folder: Path
) -> tuple[Any, dict[str, Any]]:
    """Return the model of a variant before it is written, and what was done to it."""
    settings = params.compress
    if name == "small_vocabulary":
        train, others, test = (
            read_rows(artifacts("split") / f"{side}.parquet") for side in ("train", "validation", "test")
        )
        smaller, found = cut_vocabulary(model, tokenizer, train, others, settings.kept_tokens, folder)
        own, context = load_tokenizer(folder), count_context_tokens(smaller.config)
        for asked in (unroll(others, params.task.turns), test):
            check_room(tokenizer, own, asked, params.ask_base.max_new_tokens, context)
        logger.info("%s: %d tokens are left", name, found["tokens"])
        return smaller, found
    if name not in ("int4", *HEALED) or (name == "int4" and not settings.calibration_rows):
        return model, {}
    train = read_rows(artifacts("split") / "train.parquet")
    longest = limit_length(params.finetune.max_length, read_config(artifacts("fetch_base")))
    rows = draw_calibration(train, tokenizer, settings.calibration_rows or len(train), longest, settings.seed)
    evidence: dict[str, Any] = {"calibration_rows": len(rows)}
    whole = model
    if name == "int4":
        logger.info("%s: rounding the weights so that the outputs on %d rows change least", name, len(rows))
        fit_weights(model, rows, lambda done, total: show_progress(logger, done, total, "blocks rounded"))
        return model, evidence
    if name == "fewer_layers":
        model, kept = drop_blocks(model, rows, settings.kept_layers)
        evidence["blocks"] = kept
        logger.info("%s: the blocks %s are left", name, ", ".join(map(str, kept)))
    else:
        model, count = drop_channels(model, rows, settings.kept_channels)
        evidence["channels"] = count
        logger.info("%s: %d channels of each feed-forward layer are left", name, count)
    healing = len(train) if settings.healing_rows is None else min(settings.healing_rows, len(train))
    if healing:
        logger.info("%s: healing it on %d rows", name, healing)
        model = heal_model(
            model,
            whole,
            healing,
            settings.healing_epochs,
            settings.healing_rate,
            settings.healing_teacher_weight,
            settings.seed,
            folder / "healing",
        )
        evidence["healing_teacher_weight"] = settings.healing_teacher_weight
    return model, evidence | {"healing_rows": healing}


def draw_calibration(
    rows: Sequence[Row], tokenizer: Any, count: int, max_tokens: int, seed: int
) -> list[list[int]]:
    """Return the token ids of some training rows, cut at `max_tokens`."""
    refused = find_refused(tokenizer, rows)
    usable = [number for number, row in enumerate(rows) if row.id not in refused]
    picked = sorted(random.Random(seed).sample(usable, min(count, len(usable))))
    examples = ((rows[number].messages, rows[number].tools) for number in picked)
    return [list(encode_example(tokenizer, *example).input_ids[:max_tokens]) for example in examples]
