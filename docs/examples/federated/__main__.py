"""Train one adapter on the rows of several clients, none of which sees another's: FedAvg by Flower.

In: what `dvc repro preflight` leaves: `artifacts/fetch_base`, `artifacts/split`,
`artifacts/curate/task.json`; `artifacts/initial_adapter`, which may hold an adapter to start from.
Out: `artifacts/finetune` and `reports/finetune`, as the stage `finetune` writes them;
`checkpoints/federated/<fingerprint>/`, with a folder for each client and each round.
Run: `make federated ARGS="--clients 4 --by source"`; Flower has an environment of its own.

The same command goes on where a killed one has stopped; more `--rounds` go on from those that are done.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from docs.examples.federated.adapters import read_adapter, write_adapter
from docs.examples.federated.clients import deal_rows, lay_out, read_split
from docs.examples.federated.rounds import START, read_newest, read_rounds
from stages.common.artifacts import artifacts, atomic_dir, hash_files, missing, read_json, reports
from stages.common.chat.fitting import LONG, REFUSED, count_reasons
from stages.common.errors import InputError
from stages.common.logs import get_logger, run_stage
from stages.common.model.adapter import (
    HEAD,
    OTHER_OBJECTIVES,
    InitialAdapter,
    find_start,
)
from stages.common.model.loading import limit_length, load_tokenizer, read_config
from stages.common.params.loading import Params, load_params
from stages.common.records import Row, format_canonical_json
from stages.common.task.kinds import read_task
from stages.finetune.batches import encode_rows
from stages.finetune.recipe import Recipe

logger = get_logger("federated")

WORK = Path("checkpoints") / "federated"


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for.

    Attributes:
        by: the field or tag by which rows are dealt out.
        updates: of a client in a round.
        rounds: None for as many as pass `finetune.epochs` times over the rows of the client with the most.
    """

    clients: int
    by: str
    updates: int
    rounds: int | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What is trained on what.

    Attributes:
        dealt: training and validation rows of each client; training rows that do not fit are left out.
        rejected: how many those are, by reason.
        initial: the adapter to start from; None for a new one.
        rate: peak learning rate of a round.
        rounds: how many there will be.
    """

    dealt: Sequence[tuple[Sequence[Row], Sequence[Row]]]
    rejected: dict[str, int]
    initial: InitialAdapter | None
    rate: float
    rounds: int


def main(arguments: Sequence[str] | None = None) -> None:
    """Deal the rows out, train the rounds, and write the result."""
    options = read_options(arguments)
    if find_spec("flwr") is None:
        raise InputError(
            "Flower is not installed here: its pins and the project's exclude each other",
            "make federated, which gives it an environment of its own",
        )
    params = load_params()
    check_method(params)
    plan = make_plan(params, options)
    base_sha256 = str(read_json(reports("fetch_base") / "metrics.json").get("sha256"))
    folder = WORK / compute_fingerprint(params, options, plan, base_sha256)
    folders = [folder / f"client-{number}" for number in range(1, options.clients + 1)]
    for place, (train, validation) in zip(folders, plan.dealt, strict=True):
        lay_out(place, train, validation, plan.rate)
        logger.info("%s: %d training rows, %d validation rows", place.name, len(train), len(validation))
    if plan.initial:
        with atomic_dir(folder / START) as start:
            write_adapter(read_adapter(plan.initial.folder), start)
    train_rounds(folder, folders, plan, options.updates, base_sha256)
    write_outcome(folder, plan)


def read_options(arguments: Sequence[str] | None) -> Options:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="make federated", description="Train one adapter on the rows of several simulated clients."
    )
    parser.add_argument("--clients", type=int, default=4, help="how many clients (default 4)")
    parser.add_argument(
        "--by",
        default="group",
        help="rows with the same value stay with one client: group, source, license, origin, or a tag such "
        "as user or template (default group)",
    )
    parser.add_argument("--updates", type=int, default=8, help="updates of a client in a round (default 8)")
    parser.add_argument(
        "--rounds",
        type=int,
        help="how often adapters are averaged (default: until each row was learned finetune.epochs times)",
    )
    found = parser.parse_args(arguments)
    if found.clients < 2 or found.updates < 1 or (found.rounds is not None and found.rounds < 1):
        parser.error("at least 2 clients, 1 update and 1 round are needed")
    return Options(found.clients, found.by, found.updates, found.rounds)


def check_method(params: Params) -> None:
    """Refuse methods that need more than the answers of a client's own rows.

    Raises:
        InputError: with the method.
    """
    finetune = params.finetune
    if finetune.method in OTHER_OBJECTIVES or finetune.taught_by:
        taught = ", with a teacher" if finetune.taught_by else ""
        raise InputError(
            f"finetune.method is {finetune.method}{taught}: clients learn the answers of their rows, and "
            "have no preferences, rewards or teacher",
            "set finetune.method: lora, or another method that learns answers, and finetune.teacher: null",
        )


def make_plan(params: Params, options: Options) -> Plan:
    """Return who trains on what, from what, and how long.

    Raises:
        InputError: a file is missing, or the rows cannot be dealt out or trained on.
    """
    base, finetune = artifacts("fetch_base"), params.finetune
    for path in (base / "config.json", artifacts("split") / "train.parquet"):
        if not path.exists():
            raise missing(path)
    labels = read_task().closed_set or () if finetune.method == HEAD else ()
    recipe = Recipe(**finetune.model_dump(include=set(Recipe.__dataclass_fields__)), labels=labels)
    initial = find_start(finetune.warm_start_from, recipe, labels)
    tokenizer = load_tokenizer(base)
    limit = limit_length(finetune.max_length, read_config(base), finetune.virtual_tokens)
    dealt: list[tuple[Sequence[Row], Sequence[Row]]] = []
    rejected = {LONG: 0, REFUSED: 0}
    for train, validation in deal_rows(
        read_split("train"), read_split("validation"), options.by, options.clients
    ):
        _, ids, misfits = encode_rows(
            tokenizer,
            train,
            finetune.max_length,
            finetune.on_long_row,
            params.task.turns,
            limit,
            labels,
            finetune.virtual_tokens,
        )
        kept = set(ids)
        dealt.append(([row for row in train if row.id in kept], validation))
        for reason, count in count_reasons(misfits).items():
            rejected[reason] += count
    a_round = options.updates * finetune.batch_size * finetune.gradient_accumulation
    most = max(len(train) for train, _ in dealt)
    rounds = options.rounds or math.ceil(finetune.epochs * most / a_round)
    rate = finetune.learning_rate * (finetune.warm_start_rate_factor if initial else 1.0)
    return Plan(dealt, rejected, initial, rate, rounds)


def compute_fingerprint(params: Params, options: Options, plan: Plan, base_sha256: str) -> str:
    """Return a hash of what decides the rounds, but not how many there are: more can follow."""
    parts: dict[str, Any] = {
        "finetune": params.finetune.model_dump(by_alias=True),
        "task": params.task.model_dump(by_alias=True),
        "base": base_sha256,
        "initial": hash_files(plan.initial.files) if plan.initial else None,
        "updates": options.updates,
        "rows": [[[row.id for row in side] for side in sides] for sides in plan.dealt],
    }
    return hashlib.sha256(format_canonical_json(parts).encode()).hexdigest()[:16]


def train_rounds(folder: Path, folders: Sequence[Path], plan: Plan, updates: int, base_sha256: str) -> None:
    """Train the rounds that are left, with Flower's server and clients in this process."""
    from flwr.app import Context, RecordDict

    from docs.examples.federated.client_app import app as client_app
    from docs.examples.federated.grid import LocalGrid
    from docs.examples.federated.server_app import app as server_app

    for name in ("flwr", "finetune"):  # one line a round is enough
        logging.getLogger(name).setLevel(logging.WARNING)
    settings = {
        "folder": str(folder.resolve()),
        "clients": len(folders),
        "rounds": plan.rounds,
        "updates": updates,
        "base_sha256": base_sha256,
        "measures": any(validation for _, validation in plan.dealt),
    }
    grid = LocalGrid(client_app, [place.resolve() for place in folders])
    server_app(grid, Context(0, 0, {}, RecordDict(), settings))


def write_outcome(folder: Path, plan: Plan) -> None:
    """Write the adapter of the last round in the place of that of the stage `finetune`."""
    from docs.examples.federated.report import write_result

    rounds, adapter = read_rounds(folder), read_newest(folder)
    assert adapter is not None
    rows = sum(len(train) for train, _ in plan.dealt)
    learned = sum(client["rows"] for client in rounds[-1].clients)
    if learned < rows:
        logger.warning(
            "%d of %d rows were learned in %d rounds; the model card needs all of them: leave out --rounds",
            learned,
            rows,
            len(rounds),
        )
    write_result(
        adapter,
        rounds,
        plan.rate,
        {
            "started_from": plan.initial.version if plan.initial else "base",
            "rejected_long_rows": plan.rejected[LONG],
            "rejected_refused_rows": plan.rejected[REFUSED],
            "rows_not_replayed": 0,
            "validation_rows": sum(len(validation) for _, validation in plan.dealt),
            "rows_asked": 0,
        },
    )
    logger.info("%s has the average of %d rounds", artifacts("finetune"), len(rounds))


if __name__ == "__main__":
    run_stage(main, "lower finetune.batch_size, or choose a smaller base model")
