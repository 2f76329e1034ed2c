"""What `make run` will do with the rows, and how long it takes on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.common.sources.detection.survey import Survey

CHARS_PER_TOKEN = 4.0  # of English in usual tokenizers, where the base model is not there yet
# Measured on two cores with the default base model (135 M parameters), see docs/benchmarks.md.
TRAIN_TOKENS_PER_S = {"bfloat16": 800.0, "float32": 215.0}
ANSWER_TOKENS_PER_S = {"bfloat16": 200.0, "float32": 60.0}
FIXED_MINUTES = 2.0  # every stage's start, and those that neither train nor generate
TEMPLATE_TOKENS = 25  # that a chat template puts around a row
MAX_AUTO_ROWS = 2401  # of evaluate.max_rows: auto
MODELS_ASKED = 2  # base and tuned


@dataclass(frozen=True, slots=True)
class RunEstimate:
    """The size of a run: rows and tokens to train on, rows to test on, and minutes."""

    train_rows: int
    test_rows: int
    train_tokens: int
    dtype: str
    minutes: float


def make_token_counter(base: Path) -> tuple[Callable[[str], int], bool]:
    """Return a function that counts the tokens of a text, and whether it is exact: if the base is there."""
    file = base / "tokenizer.json"
    if not file.is_file():
        return lambda text: round(len(text) / CHARS_PER_TOKEN), False
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids), True


def estimate_run(survey: Survey, params: Mapping[str, Any]) -> RunEstimate:
    """Return the estimate of a run from the figures of its rows and the raw parameters."""
    split, finetune = params["split"], params["finetune"]
    usable = survey.rows - survey.duplicates - survey.long_rows
    test_rows = max(1, round(usable * split["test_fraction"]))
    train_rows = max(1, usable - test_rows - round(usable * split["validation_fraction"]))
    tokens_per_row = survey.row_tokens.total / survey.rows + TEMPLATE_TOKENS
    train_tokens = round(train_rows * tokens_per_row * finetune["epochs"])
    dtype = pick_dtype_name(finetune["dtype"])
    cores = max(1.0, (os.cpu_count() or 2) / 2)
    limit = params["evaluate"]["max_rows"]
    asked = min(test_rows, limit if isinstance(limit, int) else MAX_AUTO_ROWS)
    answer_tokens = MODELS_ASKED * asked * max(1, survey.answer_tokens.total // survey.rows)
    seconds = (train_tokens / TRAIN_TOKENS_PER_S[dtype] + answer_tokens / ANSWER_TOKENS_PER_S[dtype]) / cores
    return RunEstimate(train_rows, test_rows, train_tokens, dtype, FIXED_MINUTES + seconds / 60)


def pick_dtype_name(wanted: str) -> str:
    """Return the number format that training takes on this machine."""
    from stages.common.models import pick_device, pick_dtype

    return str(pick_dtype(pick_device(), wanted)).removeprefix("torch.")
