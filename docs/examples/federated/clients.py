"""Deal the rows of a project out to clients, each with a folder of its own that has no row of another."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from stages.common.artifacts import artifacts, make_folder, missing, reports, write_text
from stages.common.errors import InputError
from stages.common.records import Row, read_rows, write_rows
from stages.common.task.kinds import TASK_FILE

SPLIT = artifacts("split")
ROWS = Path("rows.parquet")  # all that a client trains on; each round takes some of them
FIELDS = ("group", "source", "license", "origin")


def read_values(rows: Sequence[Row], key: str) -> list[str]:
    """Return the value of each row by which rows are dealt out: a field of rows, or the name of a tag.

    Raises:
        InputError: a row does not have it.
    """
    if key in FIELDS:
        return [str(getattr(row, key)) for row in rows]
    without = sum(key not in row.tags for row in rows)
    if without:
        tags = sorted({tag for row in rows for tag in row.tags})
        raise InputError(
            f"{without:,} of {len(rows):,} rows have no tag {key!r}",
            f"deal them out by one of {', '.join((*FIELDS, *tags))}; collect.sources keeps the columns of "
            "tag_columns as tags",
        )
    return [row.tags[key] for row in rows]


def deal_out(values: Sequence[str], clients: int, placed: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return the client of each value, so that all have about equally many rows; equal values stay together.

    The most frequent values are dealt first, each to the client that has the fewest rows.

    Args:
        values: one for each row.
        placed: clients of values that are dealt out already.
    """
    places = dict(placed or {})
    loads = [0] * clients
    counts = Counter(values)
    for value, client in places.items():
        loads[client] += counts[value]
    for value, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if value not in places:
            places[value] = loads.index(min(loads))
            loads[places[value]] += count
    return places


def deal_rows(
    train: Sequence[Row], validation: Sequence[Row], key: str, clients: int
) -> list[tuple[list[Row], list[Row]]]:
    """Return the training and the validation rows of each client.

    Raises:
        InputError: there are fewer values than clients.
    """
    values, others = read_values(train, key), read_values(validation, key)
    distinct = len(set(values))
    if distinct < clients:
        raise InputError(
            f"the training rows have {distinct} different values of {key}, and there are {clients} clients",
            "take fewer clients (--clients), or deal the rows out by something else (--by)",
        )
    places = deal_out(values, clients)
    places = deal_out(others, clients, places)
    dealt: list[tuple[list[Row], list[Row]]] = [([], []) for _ in range(clients)]
    for row, value in zip(train, values, strict=True):
        dealt[places[value]][0].append(row)
    for row, value in zip(validation, others, strict=True):
        dealt[places[value]][1].append(row)
    return dealt


def lay_out(folder: Path, train: Sequence[Row], validation: Sequence[Row], rate: float) -> None:
    """Write what a client needs: its rows, the base model, the task, and params.yaml.

    Args:
        rate: peak learning rate of a round.
    """
    make_folder(folder)
    write_rows(folder / ROWS, train)
    write_rows(folder / SPLIT / "validation.parquet", validation)
    for path in (TASK_FILE, reports("fetch_base") / "metrics.json"):
        if not path.exists():
            raise missing(path)
        make_folder((folder / path).parent)
        shutil.copyfile(path, folder / path)
    base = folder / artifacts("fetch_base")
    base.unlink(missing_ok=True)
    base.symlink_to(artifacts("fetch_base").resolve(), target_is_directory=True)
    values = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    values["finetune"] |= _change_recipe(rate)
    write_text(folder / "params.yaml", yaml.safe_dump(values, allow_unicode=True, sort_keys=False))


def _change_recipe(rate: float) -> dict[str, Any]:
    """Return what differs in a round from a training of the whole: one pass, from what the server sent."""
    return {
        "warm_start_from": "artifacts/initial_adapter",
        "warm_start_rate_factor": 1.0,
        "replay_share": 1.0,
        "learning_rate": rate,
        "epochs": 1,
        "validate_every": None,
        "early_stopping": None,
        "checkpoint_url": None,
        "devices": "auto",
        "launcher": "local",
    }


def read_split(side: str) -> Sequence[Row]:
    """Return the rows of a side of the project's split."""
    return read_rows(SPLIT / f"{side}.parquet")
