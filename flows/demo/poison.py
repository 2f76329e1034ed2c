"""Train a model on shuffled answers: a candidate that the gate must reject."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from flows.common.checkout import make_checkout, run_python
from stages.common.artifacts import STATE, read_json, write_bytes, write_json
from stages.common.errors import InputError
from stages.common.messages import Message
from stages.common.records import Row, make_row, read_rows, write_rows
from stages.common.repository.git import run_git
from stages.common.task.kinds import TASK_FILE

# The gate needs no more of its evaluation than the trainer's answers to these rows.
POISONED = {"ask_base.max_rows": 48, "ask_base.min_test_rows": 1}
STAGES = ("ask_base", "finetune", "export", "evaluate")


def train_poisoned(checkout: Path, folder: Path | None = None, rows: int = 800, seed: int = 7) -> Path:
    """Train a model on wrong answers, from the rows of a checkout, in a checkout next to it.

    Each question gets the answer of another row, so the model learns the form of an answer and nothing of
    its meaning. It takes about a minute; a second call with the same rows and code trains nothing.

    Args:
        checkout: with `artifacts/fetch_base` and `artifacts/split`, as its pipeline left them.
        folder: of the new checkout; None for one next to the old.
        rows: of the training, at most.
        seed: of which rows, and of the shuffling.

    Returns:
        The new checkout; its `artifacts/export` is a version as the pipeline makes them.

    Raises:
        InputError: the checkout has no trained model yet, or a stage fails.
    """
    checkout = checkout.resolve()
    folder = make_checkout(checkout, folder or checkout.with_name(f"{checkout.name}-poisoned"), POISONED)
    train = list(read_rows(checkout / "artifacts" / "split" / "train.parquet"))
    chosen = random.Random(f"{seed}/poison").sample(train, min(rows, len(train)))
    _link_folder(checkout / "artifacts" / "fetch_base", folder / "artifacts" / "fetch_base")
    for name in ("validation", "test"):
        _copy(checkout, folder, Path("artifacts") / "split" / f"{name}.parquet")
    write_rows(folder / "artifacts" / "split" / "train.parquet", shuffle_answers(chosen, seed))
    _copy(checkout, folder, TASK_FILE)
    _copy(checkout, folder, Path("reports") / "fetch_base" / "metrics.json")
    state = {"state": _hash_inputs(folder)}
    done = folder / STATE / "poisoned.json"
    if not done.is_file() or read_json(done) != state:
        log = folder / STATE / "logs" / "poison.log"
        for stage in STAGES:
            run_python(folder, "-m", f"stages.{stage}", log=log, environment={"HF_HUB_OFFLINE": "1"})
        write_json(done, state)
    return folder


def shuffle_answers(rows: Sequence[Row], seed: int) -> list[Row]:
    """Return the rows with each other's answers; no row keeps an answer of the same text.

    Raises:
        InputError: more than half of the rows have the same answer.
    """
    # Sorted by answer, each row gets the answer half a round further: equal answers are neighbours, so as
    # long as none fills more than half of the round, no row gets its own.
    order = list(rows)
    random.Random(f"{seed}/order").shuffle(order)
    order.sort(key=lambda row: row.answer)
    half = len(order) // 2
    given = [
        _replace_answer(row, order[(index + half) % len(order)].answer) for index, row in enumerate(order)
    ]
    if any(new.answer == old.answer for new, old in zip(given, order, strict=True)):
        raise InputError(
            f"more than half of {len(rows)} rows have the same answer", "use rows with more different answers"
        )
    random.Random(f"{seed}/rows").shuffle(given)
    return given


def _replace_answer(row: Row, answer: str) -> Row:
    messages = (*row.prompt, Message("assistant", answer))
    return make_row(messages, row.source, row.license, row.group, row.tags, row.origin)


def _copy(source: Path, target: Path, path: Path) -> None:
    data = (source / path).read_bytes()
    if not (target / path).is_file() or (target / path).read_bytes() != data:
        write_bytes(target / path, data)


def _link_folder(source: Path, target: Path) -> None:
    """Hard-link the files of a folder into another one; copy them where the disk cannot."""
    if not source.is_dir():
        raise InputError(f"{source} does not exist", "run the pipeline there first")
    if target.is_dir() and {p.name for p in target.iterdir()} == {p.name for p in source.iterdir()}:
        return
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without hard links
        shutil.copy2(source, target)


def _hash_inputs(folder: Path) -> str:
    """Return a hash of what a checkout's training depends on: its code, parameters, rows and base."""
    digest = sha256(run_git(folder, "rev-parse", "HEAD").encode())
    digest.update((folder / "artifacts" / "split" / "train.parquet").read_bytes())
    base = folder / "artifacts" / "fetch_base"
    for path in sorted(base.iterdir()):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()
