"""The reference model of a training: the model as it starts, whose log-probabilities are computed once.

It is what training starts from: the base model, or the base model with the adapter of `warm_start_from`. A
second model in memory, or switching the adapter off, would cost a forward pass at each update, and switching
it off would be wrong where training starts from an adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from stages.common.artifacts import read_json, write_json
from stages.common.chat.template import Encoded
from stages.common.errors import InputError
from stages.common.logs import get_logger
from stages.finetune.devices.group import count_processes, gather, get_rank, is_main
from stages.finetune.objectives.log_probabilities import sum_log_probabilities
from stages.finetune.objectives.protocol import Arrange
from stages.finetune.progress.divergence import name_rows
from stages.finetune.progress.validation import merge_shares

logger = get_logger("finetune")

FILE = "reference.json"

Scores = dict[str, list[Any]]


def read_id(items: Sequence[Any], number: int) -> str:
    """Return the id of the row that a pair or an answer is of."""
    row_id: str = items[number].row.id
    return row_id


def score_batches(
    model: Any,
    batches: Sequence[Sequence[int]],
    list_sequences: Callable[[Sequence[int]], list[Encoded]],
    arrange: Arrange,
    name_row: Callable[[int], str] = "number {}".format,
) -> list[list[float]]:
    """Return the log-probability of each sequence of the rows of each batch.

    Each process computes its share of the batches; all return the same.

    Args:
        name_row: returns the id of a row, for the message.

    Raises:
        InputError: one is not a number.
    """
    was_training = model.training
    model.eval()
    found = []
    with torch.no_grad():
        for rows in batches[get_rank() :: count_processes()]:
            sequences = list_sequences(rows)
            layout = arrange(sequences).to(model.device)
            learned = [example.learned_count for example in sequences]
            found.append(sum_log_probabilities(model, layout, learned).tolist())
    model.train(was_training)
    scores = merge_shares(gather(found))
    broken = [
        row
        for rows, own in zip(batches, scores, strict=True)
        for row, score in zip(rows, _split(own, len(rows)), strict=True)
        if not all(map(math.isfinite, score))
    ]
    if broken:
        raise InputError(
            f"the log-probability of an answer is not a number: rows {name_rows(broken, name_row)}",
            "look at these rows, lower finetune.learning_rate if they were trained on, set "
            "finetune.dtype: float32, or choose another base model",
        )
    return scores


def _split(scores: Sequence[float], rows: int) -> list[Sequence[float]]:
    """Return the scores of each row of a batch."""
    each = len(scores) // rows
    return [scores[first : first + each] for first in range(0, len(scores), each)]


def order_by_row(batches: Sequence[Sequence[int]], scores: Sequence[list[Any]]) -> list[Any]:
    """Return what was computed of each row of the batches, by the number of the row."""
    found = {
        row: score
        for rows, own in zip(batches, scores, strict=True)
        for row, score in zip(rows, own, strict=True)
    }
    return [found[row] for row in range(len(found))]


def list_first_epoch(plan: Sequence[Sequence[int]], rows: int) -> list[Sequence[int]]:
    """Return the batches of a plan in which every row occurs for the first time."""
    batches: list[Sequence[int]] = []
    while sum(map(len, batches)) < rows:
        batches.append(plan[len(batches)])
    return batches


def keep_scores(folder: Path, compute: Callable[[], Scores]) -> Scores:
    """Return what was computed of the reference, from the file of an earlier process where there is one.

    It is computed before training reads a checkpoint, so it is the start's also in a process that resumes.
    """
    path = folder / FILE
    found: Scores | None = gather(_read(path) if is_main() else None)[0]
    if found is None:
        found = compute()
        if is_main():
            write_json(path, found)
    return found


def _read(path: Path) -> Scores | None:
    if not path.is_file():
        return None
    try:
        found: Scores = read_json(path)
    except InputError as error:
        logger.warning("%s: it is computed again", error.what)
        return None
    return found


def switch_off_dropout(model: Any) -> None:
    """Make a model compute in training as in evaluation: a reward compares it with the reference.

    The dropout of the base model, which some have (GPT-2); that of the adapter is `finetune.dropout`.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
