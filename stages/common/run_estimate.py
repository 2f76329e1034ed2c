"""How long training and the answers to the test take on this machine, before either has begun.

The work follows from the tokens and the size of the base model; the speed, from half a second of the matrix
products that a training step consists of. Off by up to a third: the probe is short, and machines are shared.
The first updates of a training correct the estimate.

`python -m stages.common.run_estimate [STAGE ...]` prints it for the rows that `preflight` has counted.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.common.artifacts import artifacts, read_json, reports
from stages.common.errors import InputError
from stages.common.machine.memory import format_bytes, read_free_memory, read_total_memory
from stages.common.machine.products import measure_product_speed
from stages.common.machine.training_memory import Batch, estimate_training_memory, list_ways
from stages.common.model.adapter import LORA_METHODS, REPLACED_METHODS
from stages.common.model.loading import count_parameters, pick_device, pick_dtype
from stages.common.model.nf4 import NF4_BYTES

# Of the speed of plain matrix products, what a whole step reaches. Measured with the default base model in
# batches of 4 (of 16: 0.76 and 0.62); its rows share a third of their tokens, which are counted with every
# row and computed once a batch.
TRAINING_SHARE = {"float32": 0.7, "bfloat16": 0.47}
ANSWERING_SHARE = {"float32": 0.6, "bfloat16": 0.6}
TRANSFORMERS_SHARE = 0.05  # of generation by transformers, on any machine
OVERHEAD_S = 15.0  # a stage that computes: its start, imports, reading the model
ANSWER_ROOM = 1.25  # the base model mostly writes to the limit


STAGES = ("ask_base", "finetune", "evaluate")


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Weights that each token is multiplied with: in the layers, and in the output for tokens of answers."""

    layers: int
    output: int


DEFAULT_SIZE = ModelSize(106_168_320, 28_311_552)  # SmolLM2-135M


@dataclass(frozen=True, slots=True)
class Work:
    """What a run computes on.

    Attributes:
        train_tokens, train_answer_tokens: of the training rows, all epochs; the second are part of the first.
        test_tokens: of prompts and references of the test rows.
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


@dataclass(frozen=True, slots=True)
class Gradients:
    """What a backward pass computes of a model, as shares of its weights.

    Attributes:
        reach: those that it goes through to what is trained.
        trained: those whose own gradients are computed; an adapter's hardly count.
    """

    reach: float = 1.0
    trained: float = 0.0


ADAPTER_GRADIENTS = Gradients()


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of the stages that compute on all cores.

    Attributes:
        gpus: on which `finetune` trains, taken as so many times as fast as one.
    """

    dtype: str
    ask_base_s: float
    finetune_s: float
    evaluate_s: float
    gpus: int = 1

    def sum_of(self, stages: Collection[str] = STAGES) -> float:
        """Return the seconds of some of the stages together."""
        seconds = {"ask_base": self.ask_base_s, "finetune": self.finetune_s, "evaluate": self.evaluate_s}
        return sum(seconds[stage] for stage in stages)


def read_model_size(base: Path) -> ModelSize:
    """Return the size of the model in a folder; that of the default base model where there is none."""
    path = base / "config.json"
    if not path.is_file():
        return DEFAULT_SIZE
    config = json.loads(path.read_text(encoding="utf-8"))
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        head = config.get("head_dim") or hidden // heads
        kv = config.get("num_key_value_heads") or heads
        attention = hidden * head * (2 * heads + 2 * kv)
        feed_forward = 3 * hidden * config["intermediate_size"]
        layers = config["num_hidden_layers"] * (attention + feed_forward)
        return ModelSize(layers, hidden * config["vocab_size"])
    except KeyError:  # an architecture with other names
        return DEFAULT_SIZE


def estimate_run(
    work: Work,
    size: ModelSize,
    dtype: str,
    speed: float,
    paged: bool = True,
    gradients: Gradients = ADAPTER_GRADIENTS,
    gpus: int = 1,
) -> Estimate:
    """Return how long the stages take that train and answer.

    Args:
        speed: floating-point operations a second, from `measure_product_speed`.
        paged: whether the service's CPU engine answers; transformers is slower.
        gpus: that share each batch of the training. They are taken as equally fast, and what they tell each
            other as free.
    """
    # Two operations a weight and token each: forward, the gradient of the input, and that of the weight.
    layers = 2.0 * (1.0 + gradients.reach + gradients.trained)
    output = 2.0 * (2.0 + (gradients.trained == 1.0))
    train = layers * work.train_tokens * size.layers + output * work.train_answer_tokens * size.output
    weights = size.layers + size.output
    base_tokens = work.test_tokens + work.test_rows * work.longest_answer * ANSWER_ROOM
    # Prompts and references go through the model at once; the answers are generated by transformers.
    validation = 2.0 * weights * work.validation_tokens / (speed * ANSWERING_SHARE[dtype])
    validation += 2.0 * weights * work.validation_answer_tokens / (speed * TRANSFORMERS_SHARE)
    answering = speed * (ANSWERING_SHARE[dtype] if paged else TRANSFORMERS_SHARE)
    return Estimate(
        dtype,
        OVERHEAD_S + 2.0 * weights * base_tokens / answering,
        OVERHEAD_S + train / (speed * TRAINING_SHARE[dtype] * gpus) + validation,
        OVERHEAD_S + 2.0 * weights * work.test_tokens * ANSWER_ROOM / answering,
        gpus,
    )


def count_asked_rows(validate_every: float | None, validation_rows: int, has: int) -> int:
    """Return how many validation rows are asked during a training, each time counted.

    Args:
        has: how many validation rows there are.
    """
    if validate_every is None:
        return 0
    return max(1, round(1 / validate_every)) * min(validation_rows, has)


def count_processes(devices: int | str, batch_size: int, kind: str) -> int:
    """Return how many processes `finetune` will have on this host.

    Args:
        devices: as `finetune.devices`; with torchrun and `auto`, what it starts is not known yet, and the
            number is that of the GPUs.
        kind: of the device: cuda, mps or cpu.
    """
    if devices != "auto":
        return int(devices)
    if kind != "cuda":
        return 1
    import torch

    return min(torch.cuda.device_count(), batch_size)


def list_learned_sides(counted: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Return what `preflight` counted in each side; of training, what is learned where it is preferences."""
    sides: Mapping[str, Mapping[str, Any]] = counted["sides"]
    preferences = counted.get("preferences")
    return {**sides, "train": preferences} if preferences else sides


def read_work(
    sides: Mapping[str, Mapping[str, Any]],
    epochs: int,
    max_test_rows: int | None,
    validate_every: float | None = None,
    validation_rows: int = 0,
) -> Work:
    """Return what a run computes on.

    Args:
        sides: what `preflight` counted in each side of the split.
        validate_every, validation_rows: as in `finetune`.
    """
    validation = sides["validation"]
    times = count_asked_rows(validate_every, validation_rows, validation["rows"]) / max(1, validation["rows"])
    train, test = sides["train"], sides["test"]
    asked = min(test["rows"], max_test_rows or test["rows"])
    return Work(
        train_rows=train["rows"],
        train_tokens=epochs * train["tokens"],
        train_answer_tokens=epochs * train["learned_tokens"],
        test_rows=asked,
        test_tokens=round(test["tokens"] * asked / max(1, test["rows"])),
        longest_answer=test["longest_answer"],
        validation_tokens=round(validation["tokens"] * times),
        validation_answer_tokens=round(validation["learned_tokens"] * times),
    )


def read_gradients(training: Mapping[str, Any] | None) -> Gradients:
    """Return what a backward pass computes, from what `preflight` counted."""
    if training is None:
        return ADAPTER_GRADIENTS
    trained = training["trained_parameters"] / training["parameters"]
    return Gradients(training["reach"], trained if training["method"] in REPLACED_METHODS else 0.0)


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


def describe_memory(
    params: Any,
    counted: Mapping[str, Any],
    base: Path,
    dtype: str,
    free: int,
    processes: int = 1,
    has_gpus: bool = False,
) -> str | None:
    """Return about how much memory the training takes, as a line; None where the base model is another kind.

    Args:
        counted: by `preflight`.
        free: on one GPU, or on the machine.
        has_gpus: whether each process has a GPU to itself; else they share the memory.
    """
    finetune, train, training = params.finetune, list_learned_sides(counted)["train"], counted.get("training")
    replaced = training["trained_parameters"] if training and finetune.method in REPLACED_METHODS else 0
    rank = finetune.rank if finetune.method in LORA_METHODS else 0
    rows = -(-min(finetune.batch_size, train["rows"]) // processes)
    element_bytes = 4 if dtype == "float32" else 2
    batch = Batch(rows, finetune.virtual_tokens + train["longest"], train["longest_answer"])
    try:
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        weights = count_parameters(base)
        state = (config, weights, rank, batch, element_bytes, replaced)
        ways = list_ways(finetune.sharding, finetune.gradient_checkpointing, processes, finetune.method)
        each = [
            estimate_training_memory(*state, is_averaged=processes > 1, checkpointing=twice, shards=shards)
            for shards, twice in ways
        ]
        quantized = training.get("quantized_parameters", 0) if training else 0
        saved = int(quantized * (element_bytes - NF4_BYTES))
        needs = [(needed - saved) * (1 if has_gpus else processes) for needed in each]
    except (OSError, KeyError):
        return None
    place = next((place for place, needed in enumerate(needs) if needed <= free), -1)
    needed, (shards, twice) = needs[place], ways[place]
    where = ""
    if processes > 1:
        where = f" on each of {processes} GPUs" if has_gpus else f" in {processes} processes"
    line = f"  memory: finetune takes about {format_bytes(needed)}{where}"
    if shards > 1:
        line += ", which share the model (finetune.sharding)"
    if twice:
        line += ", computing each layer twice (finetune.gradient_checkpointing)"
    if needed > free:
        line += (
            f", and {format_bytes(free)} are free: lower finetune.batch_size (and raise "
            "finetune.gradient_accumulation by as much) or finetune.max_length"
            + (", or train fewer weights (finetune.method)" if replaced else "")
        )
    return line


def describe_costs(seconds: float, settings: Any) -> str | None:
    """Return about what the run takes in energy and money, as a line; None where neither is known.

    Args:
        settings: the section `flows.training`.
    """
    hours, found = seconds / 3600, []
    if settings.power_watts is not None:
        watt_hours = settings.power_watts * hours
        found.append(f"{watt_hours:.3g} Wh at {settings.power_watts:g} W")
        if settings.co2_g_per_kwh is not None:
            found.append(f"{watt_hours * settings.co2_g_per_kwh / 1000:.3g} g CO2")
    if settings.price_per_hour is not None:
        found.append(f"a price of {settings.price_per_hour * hours:.3g}")
    return f"  it takes about {', '.join(found)}" if found else None


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
    finetune = params.finetune
    work = read_work(
        list_learned_sides(counted),
        finetune.epochs,
        choose_max_test_rows(params.ask_base.max_rows),
        finetune.validate_every,
        finetune.validation_rows,
    )
    base = artifacts("fetch_base")
    device = pick_device()
    has_gpus = device.type == "cuda"
    processes = count_processes(finetune.devices, finetune.batch_size, device.type)
    dtype = str(pick_dtype(device, finetune.dtype)).removeprefix("torch.")
    speed = measure_product_speed(dtype, device.type)
    paged = device.type == "cpu" and params.export.gguf and params.ask_base.engine != "transformers"
    training = counted.get("training")
    estimate = estimate_run(
        work,
        read_model_size(base),
        dtype,
        speed,
        paged,
        read_gradients(training),
        processes if has_gpus else 1,  # processes on a CPU share its cores
    )
    stages = [stage for stage in STAGES if stage in sys.argv[1:]] or STAGES
    lines: list[str | None] = [describe_machine(device), describe(work, estimate, stages)]
    if "finetune" in stages:
        free = read_free_memory()
        if has_gpus:
            free, _ = torch.cuda.mem_get_info(device)
        lines.append(describe_memory(params, counted, base, dtype, free, processes, has_gpus))
    lines.append(describe_costs(estimate.sum_of(stages), params.flows.training))
    sys.stdout.write("".join(f"{line}\n" for line in lines if line))


if __name__ == "__main__":
    main()
