"""Finetune: train an adapter of the base model, or weights of it.

In: `artifacts/split/train.parquet`, `validation.parquet`, `artifacts/fetch_base/`;
`artifacts/curate/task.json`; `artifacts/initial_adapter/`, which may hold an adapter to start from.
Out: `artifacts/finetune/` (a peft adapter, or the trained weights); `reports/finetune/metrics.json`,
`loss.csv`, `validation.csv`, `loss.svg`.
Run: `python -m stages.finetune`

Only answers are learned, by the objective that `method` names. A killed run resumes from its last complete
checkpoint in `checkpoints/finetune/<fingerprint>/` and ends with the same adapter, byte by byte, as an
uninterrupted run in as many processes; with `checkpoint_url` also on another machine. `devices` has how
several processes train together; the first of them writes and reports.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace

from stages.common.artifacts import artifacts, missing, reports, write_json
from stages.common.chat.fitting import (
    LONG,
    REFUSED,
    count_reasons,
    describe_misfits,
    encode_fitting,
)
from stages.common.errors import InputError
from stages.common.logs import get_logger, run_stage
from stages.common.machine.parent import end_with_parent
from stages.common.model.adapter import HEAD, STARTED_METHODS, describe_missing_start, find_start
from stages.common.model.label_head import check_labels
from stages.common.model.loading import (
    limit_length,
    load_tokenizer,
    pick_dtype,
    read_config,
    read_position_limit,
)
from stages.common.params.loading import load_params
from stages.common.records import Row, read_rows
from stages.common.storage.remote_folder import RemoteFolder
from stages.common.task.kinds import read_task
from stages.finetune.batches import view_examples
from stages.finetune.checkpoint_store import open_store
from stages.finetune.checkpoints import CHECKPOINTS, remove_other_runs
from stages.finetune.devices.group import compute_on_hosts, count_processes, is_first_of_host, is_main
from stages.finetune.devices.launch import run_on_devices
from stages.finetune.devices.ray_cluster import Files
from stages.finetune.objectives.data import read_training_data
from stages.finetune.objectives.rewards import check_compared
from stages.finetune.plots import plot_loss
from stages.finetune.progress.cost import Prices
from stages.finetune.progress.watch import VALIDATION, plan_watch
from stages.finetune.recipe import Recipe, compute_fingerprint
from stages.finetune.result import write_loss_csv, write_validation_csv

logger = get_logger("finetune")

TRAIN = artifacts("split") / "train.parquet"
INPUTS = (
    *("params.yaml", "artifacts/curate/task.json", "artifacts/fetch_base", "artifacts/split"),
    "reports/fetch_base/metrics.json",
)
OUTPUTS = ("artifacts/finetune", "reports/finetune")

WHEN_MEMORY_IS_FULL = (
    "lower finetune.batch_size (and raise finetune.gradient_accumulation by as much), lower "
    "finetune.max_length, set finetune.gradient_checkpointing: true, or choose a smaller base model"
)


def read_training_rows() -> Sequence[Row]:
    """Read the training rows.

    Raises:
        InputError: there are none.
    """
    rows = read_rows(TRAIN)
    if not rows:
        raise InputError(f"{TRAIN} has no rows", "check reports/split/metrics.json")
    return rows


def main() -> None:
    """Train on what `split` wrote, with the settings of `finetune` in `params.yaml`."""
    if not TRAIN.exists():  # before torch counts devices, which takes seconds
        raise missing(TRAIN)
    params = load_params().finetune
    files = Files(INPUTS, (params.warm_start_from, params.teacher), OUTPUTS, params.checkpoint_url)
    run_on_devices(
        train_adapter, params.devices, params.launcher, params.batch_size, WHEN_MEMORY_IS_FULL, files
    )


def train_adapter() -> None:
    """Train in this process, with the others of its group; the first one writes the result."""
    everything = load_params()
    params, turns = everything.finetune, everything.task.turns
    labels = read_task().closed_set or () if params.method == HEAD else ()
    if params.method == HEAD:
        check_labels(labels)
    recipe = Recipe(**params.model_dump(include=set(Recipe.__dataclass_fields__)), labels=labels)
    if params.checkpoint_url and is_first_of_host():
        RemoteFolder(params.checkpoint_url).check_writable()
    base = artifacts("fetch_base")
    initial = find_start(params.warm_start_from, recipe, labels)
    if initial:
        recipe = replace(recipe, learning_rate=recipe.learning_rate * params.warm_start_rate_factor)
    rows = read_training_rows()
    tokenizer = load_tokenizer(base)
    config = read_config(base)
    limit = limit_length(params.max_length, config, params.virtual_tokens)
    validation_rows = read_rows(artifacts("split") / "validation.parquet")
    data = read_training_data(everything, tokenizer, rows, validation_rows, initial, limit, labels)
    validated, not_validated = encode_fitting(
        tokenizer,
        validation_rows,
        limit,
        learned_turns=turns,
    )
    validation = view_examples(validated, labels)
    watch = plan_watch(
        everything,
        tokenizer,
        list({row.id: row for row, _ in validated}.values()),
        read_position_limit(config, params.virtual_tokens),
    )
    for rows_of, excluded in (("training", data.misfits), ("validation", not_validated)):
        if excluded:
            logger.warning(
                "%d %s rows excluded: %s\n%s",
                len(excluded),
                rows_of,
                count_reasons(excluded),
                describe_misfits(excluded, 3),
            )
    if data.not_replayed:
        logger.info("%d rows not replayed: the adapter was trained on them", data.not_replayed)
    if params.method in STARTED_METHODS and not initial:
        logger.warning("%s", describe_missing_start(params.method))

    # Imported late: torch, peft and transformers take seconds, and run_stage sets their environment first.
    from stages.finetune.adapter import build_model, save_adapter
    from stages.finetune.devices.sharding import bring_together
    from stages.finetune.progress.fit import decide_sharding
    from stages.finetune.trainer import train

    watched = watch.describe() if watch else None
    checkpoints = CHECKPOINTS / compute_on_hosts(
        lambda: compute_fingerprint(recipe, data.sequences, base, initial, watched, data.marks),
        "the recipe, rows, base model, code or library versions",
        "copy params.yaml, artifacts/ and the code of one host to the others, with the same versions",
    )
    store = open_store(params.checkpoint_url, checkpoints.name)
    if is_main():
        remove_other_runs(checkpoints)
    sharded = decide_sharding(
        "none" if params.taught_by else params.sharding,  # every process has the whole teacher
        recipe,
        base,
        config,
        data.sequences,
        params.gradient_checkpointing,
    )
    model = build_model(base, recipe, initial, sharded)
    dtype = str(pick_dtype(model.device, recipe.dtype)).removeprefix("torch.")
    share = " that share the model" if sharded else ""
    processes = f" in {count_processes()} processes{share}" if count_processes() > 1 else ""
    where = f"{dtype} on {model.device.type}{processes}"
    logger.info("training on %d rows, %s in %s", data.rows, recipe.method, where)
    result = train(
        model,
        data.make_objective(),
        validation,
        tokenizer.pad_token_id,
        recipe,
        checkpoints,
        params.checkpoint_every_steps,
        data.row_ids.__getitem__,
        watch,
        Prices(**everything.flows.training.model_dump(include=set(Prices.__dataclass_fields__))),
        params.gradient_checkpointing,
        store,
    )
    if recipe.method == "grpo":
        check_compared([point.figures for point in result.curve])
    bring_together(model)
    if not is_main():
        return

    trained_ids = initial.read_trained_ids() if initial else frozenset()
    trained_now = {data.row_ids[number] for number in result.learned_rows}
    save_adapter(model, recipe, artifacts("finetune"), trained_ids | trained_now)
    write_loss_csv(result.curve, reports("finetune") / "loss.csv")
    write_validation_csv(result.validation, VALIDATION)
    plot_loss(result, watch.sample.read_scales() if watch else {}, reports("finetune") / "loss.svg")
    write_json(
        reports("finetune") / "metrics.json",
        {
            "method": recipe.method,
            "started_from": initial.version if initial else "base",
            "learning_rate": recipe.learning_rate,
            "train_rows": data.rows,
            "rejected_long_rows": count_reasons(data.misfits).get(LONG, 0),
            "rejected_refused_rows": count_reasons(data.misfits).get(REFUSED, 0),
            "rows_not_replayed": data.not_replayed,
            **data.report,
            "validation_rows": len(validation_rows) - len(not_validated),
            "rejected_validation_rows": len(not_validated),
            "rows_asked": len(watch.sample.rows) if watch else 0,
            **result.to_metrics(),
        },
    )
    shutil.rmtree(checkpoints)
    if store:
        store.finish()
    logger.info(
        "%d updates in %.0f s, %.0f tokens/s, train loss %.4f, validation loss %s",
        len(result.curve),
        result.seconds,
        result.tokens_per_second,
        result.curve[-1].loss,
        "-" if result.validation_loss is None else f"{result.validation_loss:.4f}",
    )
    logger.info("it took %s", result.cost.describe())


if __name__ == "__main__":
    # Processes that are started find `train_adapter` in this module by its name, which is not `__main__`.
    from stages.finetune import __main__ as stage

    end_with_parent()  # if compress started it
    run_stage(stage.main, WHEN_MEMORY_IS_FULL)
