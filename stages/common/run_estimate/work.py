"""What a run computes on: the rows and tokens of each side, as `preflight` counted them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Work:
    """What a run computes on.

    Attributes:
        train_tokens, train_answer_tokens: that are trained on, all epochs; the second are part of the first.
        test_tokens: of prompts and references of the test rows.
        train_repeated, test_repeated: of these tokens, those that are not computed: all rows begin alike, and
            a beginning is computed once a batch of the training, and once by the service's CPU engine.
        longest_answer: tokens of the longest reference.
        validation_tokens, validation_answer_tokens: of all rows asked during the training.
    """

    train_rows: int
    train_tokens: int
    train_answer_tokens: int
    test_rows: int
    test_tokens: int
    longest_answer: int
    validation_tokens: int = 0
    validation_answer_tokens: int = 0
    train_repeated: int = 0
    test_repeated: int = 0
    epochs: int = 1


def list_learned_sides(counted: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Return what `preflight` counted in each side; of training, what is learned where it is preferences."""
    sides: Mapping[str, Mapping[str, Any]] = counted["sides"]
    preferences = counted.get("preferences")
    return {**sides, "train": preferences} if preferences else sides


def read_work(
    sides: Mapping[str, Mapping[str, Any]],
    epochs: int,
    batch_size: int,
    max_test_rows: int | None,
    validate_every: float | None = None,
    validation_rows: int = 0,
    times: int = 1,
) -> Work:
    """Return what a run computes on.

    Args:
        sides: what `preflight` counted in each side of the split.
        batch_size, validate_every, validation_rows: as in `finetune`.
        times: that a row is in its batch, with an answer of the model's own each time.
    """
    validation = sides["validation"]
    points = count_asked_rows(validate_every, validation_rows, validation["rows"])
    asked_again = points / max(1, validation["rows"])
    train, test = sides["train"], sides["test"]
    asked = min(test["rows"], max_test_rows or test["rows"])
    trained = epochs * train["rows"]
    return Work(
        train_rows=train["rows"],
        train_tokens=times * epochs * train["tokens"],
        train_answer_tokens=times * epochs * train["learned_tokens"],
        test_rows=asked,
        test_tokens=round(test["tokens"] * asked / max(1, test["rows"])),
        longest_answer=test["longest_answer"],
        validation_tokens=round(validation["tokens"] * asked_again),
        validation_answer_tokens=round(validation["learned_tokens"] * asked_again),
        # Preferences are not looked at for it: a row of theirs has two answers to one prompt.
        train_repeated=train.get("shared_tokens", 0) * (times * trained - count_batches(trained, batch_size)),
        test_repeated=test.get("shared_tokens", 0) * max(0, asked - 1),
        epochs=epochs,
    )


def count_asked_rows(validate_every: float | None, validation_rows: int, has: int) -> int:
    """Return how many validation rows are asked during a training, each time counted.

    Args:
        has: how many validation rows there are.
    """
    if validate_every is None:
        return 0
    return max(1, round(1 / validate_every)) * min(validation_rows, has)


def count_batches(rows: int, batch_size: int) -> int:
    """Return into how many batches rows are divided."""
    return -(-rows // batch_size)
