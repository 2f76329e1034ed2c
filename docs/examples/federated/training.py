"""What a client does in its folder: train what it received on rows of its own, and measure it on others.

The training is the stage `finetune` itself. All paths are those of the stage, in the current folder.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docs.examples.federated.adapters import Adapter, read_adapter, write_adapter
from docs.examples.federated.clients import ROWS, SPLIT
from stages.common.artifacts import artifacts, make_folder, read_json, reports
from stages.common.chat.fitting import encode_fitting
from stages.common.errors import InputError
from stages.common.model.adapter import (
    HEAD,
    clear_initial_adapter,
    find_start,
    put_initial_adapter,
    read_trained_ids,
    write_trained_ids,
)
from stages.common.model.loading import limit_length, load_tokenizer, read_config
from stages.common.params.loading import load_params
from stages.common.records import read_rows, write_rows
from stages.common.spool import pick
from stages.common.task.kinds import read_task
from stages.finetune import __main__ as finetune
from stages.finetune.batches import plan_batches, view_examples
from stages.finetune.recipe import Recipe

RECEIVED = Path("received")


@dataclass(frozen=True, slots=True)
class Trained:
    """What a client trained in a round.

    Attributes:
        metrics: of its training, as `stages.finetune` reports them.
        rows: how many of its rows it has learned so far.
    """

    adapter: Adapter
    metrics: dict[str, Any]
    rows: int


def receive(adapter: Adapter | None, base_sha256: str, round_number: int) -> None:
    """Make an adapter the one that this client starts from; without one, all start from the recipe's seed.

    Raises:
        InputError: this client has another base model than the server.
    """
    own = read_json(reports("fetch_base") / "metrics.json").get("sha256")
    if own != base_sha256:
        raise InputError(
            f"the server averages adapters of a base model with the sha256\n  {base_sha256}, and this client "
            f"has\n  {own}",
            "fetch the same base model (fetch_base in params.yaml)",
        )
    make_folder(artifacts("initial_adapter"))
    clear_initial_adapter()
    if adapter is None:
        return
    write_adapter(adapter, RECEIVED)
    write_trained_ids(read_trained_ids(artifacts("finetune")), RECEIVED)  # of this client alone
    put_initial_adapter(RECEIVED, f"round-{round_number - 1}", base_sha256)


def draw_rows(total: int, count: int, round_number: int, seed: int) -> list[int]:
    """Return the numbers of the rows of a round: passes over all rows, each in an order of its own."""
    first = (round_number - 1) * count
    drawn = []
    for number in range(first, first + count):
        passed, place = divmod(number, total)
        order = list(range(total))
        random.Random(f"{seed} {passed}").shuffle(order)
        drawn.append(order[place])
    return drawn


def train_round(round_number: int, updates: int) -> Trained:
    """Train the received adapter for some updates, on the rows of the round."""
    params = load_params().finetune
    rows = read_rows(ROWS)
    count = min(len(rows), updates * params.batch_size * params.gradient_accumulation)
    write_rows(SPLIT / "train.parquet", pick(rows, draw_rows(len(rows), count, round_number, params.seed)))
    finetune.main()
    metrics = read_json(reports("finetune") / "metrics.json")
    folder = artifacts("finetune")
    return Trained(read_adapter(folder), metrics, len(read_trained_ids(folder)))


def measure_loss() -> tuple[float, int]:
    """Return the received adapter's mean loss per answer token of the validation rows, and the tokens."""
    from stages.finetune.adapter import build_model
    from stages.finetune.answer_loss import compute_mean_loss
    from stages.finetune.shared_prefix import lay_out

    everything = load_params()
    params = everything.finetune
    labels = read_task().closed_set or () if params.method == HEAD else ()
    recipe = Recipe(**params.model_dump(include=set(Recipe.__dataclass_fields__)), labels=labels)
    base = artifacts("fetch_base")
    tokenizer = load_tokenizer(base)
    limit = limit_length(params.max_length, read_config(base), params.virtual_tokens)
    rows = read_rows(SPLIT / "validation.parquet")
    fitting, _ = encode_fitting(tokenizer, rows, limit, learned_turns=everything.task.turns)
    examples = view_examples(fitting, labels)
    tokens = sum(example.learned_count for example in examples)
    if not tokens:
        return 0.0, 0
    model = build_model(base, recipe, find_start(params.warm_start_from, recipe, labels))
    plan: Sequence[Sequence[int]] = plan_batches(
        [len(example.input_ids) for example in examples], recipe.batch_size, 1, recipe.seed
    )
    batches = (lay_out([examples[row] for row in batch], tokenizer.pad_token_id, False) for batch in plan)
    return compute_mean_loss(model, batches) or 0.0, tokens
