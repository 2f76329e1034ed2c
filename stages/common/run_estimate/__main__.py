"""How long training and the answers to the test take on this machine, before either has begun.

The work follows from the tokens and the size of the base model; the speed, from half a second of the matrix
products that a training step consists of. Off by up to a third where nothing else is at work, and by more
where the probe, which is short, shares the machine. The first updates of a training correct the estimate.

`python -m stages.common.run_estimate [STAGE ...]` prints it for the rows that `preflight` has counted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.common.artifacts import artifacts, read_json, reports
from stages.common.errors import InputError
from stages.common.machine.devices import read_gpu_watts
from stages.common.machine.memory import format_bytes, read_free_memory, read_total_memory
from stages.common.machine.products import measure_product_speed
from stages.common.machine.training_memory import (
    Batch,
    count_kernel_bytes,
    estimate_training_memory,
    list_ways,
)
from stages.common.model.adapter import LORA_METHODS, REPLACED_METHODS
from stages.common.model.loading import count_parameters, pick_device, pick_dtype
from stages.common.model.nf4 import NF4_BYTES
from stages.common.run_estimate.methods import PLAIN, MethodWork, read_method
from stages.common.run_estimate.seconds import (
    STAGES,
    Estimate,
    count_processes,
    estimate_run,
    read_gradients,
    read_model_size,
    read_text_config,
)
from stages.common.run_estimate.work import Work, count_batches, list_learned_sides, read_work


@dataclass(frozen=True, slots=True)
class Memory:
    """About what a training takes, in parts that processes share, and whether layers are computed twice."""

    needed: int
    shards: int
    computes_twice: bool


def format_minutes(seconds: float) -> str:
    """Return a duration to half a minute, as text: the estimate is no more precise."""
    half_minutes = max(1, round(seconds / 30))
    minutes = half_minutes / 2
    return f"{minutes:g} min"


def describe(work: Work, estimate: Estimate, stages: Collection[str] = STAGES) -> str:
    """Return the estimate of some stages as lines for a terminal."""
    rows = {"ask_base": work.test_rows, "finetune": work.train_rows, "evaluate": work.test_rows}
    lines = [f"about {format_minutes(estimate.sum_of(stages))} on this machine, in {estimate.dtype}:"]
    for stage in STAGES:
        if stage in stages:
            tokens = f" ({work.train_tokens:,} tokens)" if stage == "finetune" else ""
            minutes = format_minutes(estimate.sum_of([stage]))
            gpus = estimate.gpus if stage == "finetune" else 1
            assumed = f" on {gpus} GPUs, if they are {gpus} times as fast as one" if gpus > 1 else ""
            lines.append(f"  {stage}: {rows[stage]:,} rows{tokens}, about {minutes}{assumed}")
    return "\n".join(lines)


def describe_machine(device: Any) -> str:
    """Return what the machine has, as a line."""
    memory = f"{format_bytes(read_total_memory())} of memory, {format_bytes(read_free_memory())} of it free"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = ""
    if device.type == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        gpu = f"; {name} with {format_bytes(total)}, {format_bytes(free)} of it free"
    return f"this machine: {cores} cores, {memory}{gpu}"


def choose_memory(
    params: Any,
    counted: Mapping[str, Any],
    base: Path,
    dtype: str,
    free: int,
    processes: int = 1,
    has_gpus: bool = False,
    method: MethodWork = PLAIN,
) -> Memory | None:
    """Return about how much memory the training takes, in the fastest way that fits.

    None where the base model is of another kind.

    Args:
        counted: by `preflight`.
        free: on one GPU, or on the machine.
        has_gpus: whether each process has a GPU to itself; else they share the memory.
    """
    finetune, train, training = params.finetune, list_learned_sides(counted)["train"], counted.get("training")
    replaced = training["trained_parameters"] if training and finetune.method in REPLACED_METHODS else 0
    rank = finetune.rank if finetune.method in LORA_METHODS else 0
    rows = method.in_memory * -(-min(finetune.batch_size, train["rows"]) // processes)
    element_bytes = 4 if dtype == "float32" else 2
    batch = Batch(rows, finetune.virtual_tokens + train["longest"], train["longest_answer"])
    try:
        config = read_text_config(base / "config.json")
        weights = count_parameters(base)
        state = (config, weights, rank, batch, element_bytes, replaced)
        sharding = "none" if finetune.taught_by else finetune.sharding
        ways = list_ways(sharding, finetune.gradient_checkpointing, processes, finetune.method)
        each = [
            estimate_training_memory(*state, is_averaged=processes > 1, checkpointing=twice, shards=shards)
            for shards, twice in ways
        ]
    except (OSError, KeyError):
        return None
    quantized = training.get("quantized_parameters", 0) if training else 0
    more = method.teacher * element_bytes * method.is_beside - int(quantized * (element_bytes - NF4_BYTES))
    batches = count_batches(finetune.epochs * train["rows"], finetune.batch_size)
    more += count_kernel_bytes(element_bytes, "cuda" if has_gpus else "cpu", batches)
    needs = [(needed + more) * (1 if has_gpus else processes) for needed in each]
    place = next((place for place, needed in enumerate(needs) if needed <= free), -1)
    return Memory(needs[place], *ways[place])


def describe_memory(
    memory: Memory | None, finetune: Any, free: int, processes: int = 1, has_gpus: bool = False
) -> str:
    """Return about how much memory the training takes, as a line."""
    if memory is None:
        return "  memory: not known before finetune has loaded this kind of model, and says what it takes"
    where = ""
    if processes > 1:
        where = f" on each of {processes} GPUs" if has_gpus else f" in {processes} processes"
    line = f"  memory: finetune takes about {format_bytes(memory.needed)}{where}"
    if memory.shards > 1:
        line += ", which share the model (finetune.sharding)"
    if memory.computes_twice:
        line += ", computing each layer twice (finetune.gradient_checkpointing)"
    if memory.needed > free:
        line += (
            f", and {format_bytes(free)} are free: lower finetune.batch_size (and raise "
            "finetune.gradient_accumulation by as much) or finetune.max_length"
            + (", or train fewer weights (finetune.method)" if finetune.method in REPLACED_METHODS else "")
        )
    return line


def describe_costs(seconds: float, settings: Any, gpu_watts: float | None = None) -> str:
    """Return about what the run takes in energy and money, as a line.

    Args:
        settings: the section `flows.training`.
        gpu_watts: the most that all GPUs together may take; `power_watts` comes before it.
    """
    hours = seconds / 3600
    watts = gpu_watts if settings.power_watts is None else settings.power_watts
    if watts is None:
        found = ["energy not known (flows.training.power_watts)"]
    else:
        of = "" if settings.power_watts is not None else "the most that the GPUs may take, "
        watt_hours = watts * hours
        found = [f"about {watt_hours:.3g} Wh at {of}{watts:g} W"]
        if settings.co2_g_per_kwh is not None:
            found.append(f"{watt_hours * settings.co2_g_per_kwh / 1000:.3g} g CO2")
    if settings.price_per_hour is not None:
        found.append(f"a price of about {settings.price_per_hour * hours:.3g}")
    return f"  costs: {', '.join(found)}"


def main() -> None:
    """Print the estimate of the stages that are named, or all, for the rows that `preflight` counted."""
    import torch

    from stages.common.params.loading import load_params
    from stages.common.statistics.sizes import choose_max_test_rows

    try:
        params: Any = load_params()
        counted = read_json(reports("preflight") / "metrics.json")
        if "sides" not in counted:
            raise InputError(
                f"preflight counted no tokens: {'; '.join(counted['problems'])}",
                "run it again once that is fixed: dvc repro preflight",
            )
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    finetune, training = params.finetune, counted.get("training")
    method = read_method(finetune, training.get("teacher_parameters", 0) if training else 0)
    work = read_work(
        list_learned_sides(counted),
        finetune.epochs,
        finetune.batch_size,
        choose_max_test_rows(params.ask_base.max_rows),
        finetune.validate_every,
        finetune.validation_rows,
        method.trained,
    )
    base = artifacts("fetch_base")
    device = pick_device()
    has_gpus = device.type == "cuda"
    processes = count_processes(finetune.devices, finetune.batch_size, device.type)
    dtype = str(pick_dtype(device, finetune.dtype)).removeprefix("torch.")
    speed = measure_product_speed(dtype, device.type)
    paged = device.type == "cpu" and counted.get("answered_by") == "paged"
    free = torch.cuda.mem_get_info(device)[0] if has_gpus else read_free_memory()
    memory = choose_memory(params, counted, base, dtype, free, processes, has_gpus, method)
    estimate = estimate_run(
        work,
        read_model_size(base),
        dtype,
        speed,
        paged,
        read_gradients(training),
        processes if has_gpus else 1,  # processes on a CPU share its cores
        method,
        memory.computes_twice if memory else finetune.gradient_checkpointing is True,
    )
    stages = [stage for stage in STAGES if stage in sys.argv[1:]] or STAGES
    each = read_gpu_watts() if has_gpus else None
    gpu_watts = each * processes if each else None
    lines = [describe_machine(device), describe(work, estimate, stages)]
    if "finetune" in stages:
        lines.append(describe_memory(memory, finetune, free, processes, has_gpus))
    lines.append(describe_costs(estimate.sum_of(stages), params.flows.training, gpu_watts))
    if params.compress.variants and "evaluate" in stages:
        lines.append(f"  compress ({', '.join(params.compress.variants)}) is not in it")
    sys.stdout.write("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main()
