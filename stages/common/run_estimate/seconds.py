"""How long the stages take that train and answer: the operations of their work, by the machine's speed."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.common.model.adapter import REPLACED_METHODS
from stages.common.model.loading import read_weight_sizes
from stages.common.run_estimate.methods import PLAIN, MethodWork
from stages.common.run_estimate.work import Work

# Of the speed of plain matrix products, what a whole step reaches. Measured with the default base model in
# batches of 4 (of 16: 0.52 and 0.43).
TRAINING_SHARE = {"float32": 0.52, "bfloat16": 0.35}
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
    """Return the size of the model in a folder; that of the default base model where there is none.

    Where its configuration has other names than most, its files tell how many weights it has. Of a model that
    also sees or hears, it is the size of the part that reads text.
    """
    path = base / "config.json"
    if not path.is_file():
        return DEFAULT_SIZE
    config = read_text_config(path)
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        head = config.get("head_dim") or hidden // heads
        kv = config.get("num_key_value_heads") or heads
        attention = hidden * head * (2 * heads + 2 * kv)
        inner = config["intermediate_size"]
        if experts := config.get("num_experts_per_tok"):  # of which each token has a few
            inner = experts * config.get("moe_intermediate_size", inner)
        layers = config["num_hidden_layers"] * (attention + 3 * hidden * inner)
        return ModelSize(layers, hidden * config["vocab_size"])
    except KeyError:  # an architecture with other names
        return _count_matrices(base)


def read_text_config(path: Path) -> dict[str, Any]:
    """Return a config.json, of a model that also sees or hears the part on text.

    Without transformers, whose import takes longer than the estimate (`read_config` has it).
    """
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {**config, **(config.get("text_config") or {})}


def _count_matrices(base: Path) -> ModelSize:
    """Return the size of a model by its files: the largest tensor, which is the embedding, and all others."""
    try:
        *others, embedding = sorted(read_weight_sizes(base))
    except (OSError, ValueError):  # not fetched yet
        return DEFAULT_SIZE
    return ModelSize(sum(others), embedding)


def estimate_run(
    work: Work,
    size: ModelSize,
    dtype: str,
    speed: float,
    paged: bool = True,
    gradients: Gradients = ADAPTER_GRADIENTS,
    gpus: int = 1,
    method: MethodWork = PLAIN,
    computes_twice: bool = False,
) -> Estimate:
    """Return how long the stages take that train and answer.

    Args:
        speed: floating-point operations a second, from `measure_product_speed`.
        paged: whether the service's CPU engine answers; transformers is slower.
        gpus: that share each batch of the training. They are taken as equally fast, and what they tell each
            other as free.
        computes_twice: whether layers are computed again in the backward pass.
    """
    # Two operations a weight and token each: forward, the gradient of the input, and that of the weight.
    layers = 2.0 * (1.0 + computes_twice + gradients.reach + gradients.trained)
    output = 2.0 * (2.0 + (gradients.trained == 1.0))
    in_layers = (work.train_tokens - work.train_repeated) * size.layers
    in_output = work.train_answer_tokens * size.output
    scored = method.scored + method.scored_before / work.epochs
    train = layers * in_layers + output * in_output + 2.0 * scored * (in_layers + in_output)
    if method.is_beside:  # a teacher reads whole rows, and computes its output layer for each token
        train += 2.0 * method.teacher * work.train_tokens
    weights = size.layers + size.output
    writing = 0.0
    if method.sampled:
        # The answers to one prompt begin with the same reading of it.
        writing = _write(weights, work.train_tokens / method.sampled, work.train_answer_tokens, dtype)
    elif method.teacher and not method.is_beside:
        once = work.train_tokens / work.epochs, work.train_answer_tokens / work.epochs
        writing = _write(method.teacher, *once, dtype)
    asked = work.test_tokens - (work.test_repeated if paged else 0)
    base_tokens = asked + work.test_rows * work.longest_answer * ANSWER_ROOM
    # Prompts and references go through the model at once; the answers are generated by transformers.
    validation = _write(weights, work.validation_tokens, work.validation_answer_tokens, dtype)
    answering = speed * (ANSWERING_SHARE[dtype] if paged else TRANSFORMERS_SHARE)
    return Estimate(
        dtype,
        OVERHEAD_S + 2.0 * weights * base_tokens / answering,
        OVERHEAD_S + (train / TRAINING_SHARE[dtype] + writing) / (speed * gpus) + validation / speed,
        OVERHEAD_S + 2.0 * weights * asked * ANSWER_ROOM / answering,
        gpus,
    )


def _write(weights: int, tokens: float, answer_tokens: float, dtype: str) -> float:
    """Return the operations of plain products that take as long as answers that transformers writes.

    Args:
        tokens: of prompts and answers, which go through the model at once.
    """
    return 2.0 * weights * (tokens / ANSWERING_SHARE[dtype] + answer_tokens / TRANSFORMERS_SHARE)


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


def read_gradients(training: Mapping[str, Any] | None) -> Gradients:
    """Return what a backward pass computes, from what `preflight` counted."""
    if training is None:
        return ADAPTER_GRADIENTS
    trained = training["trained_parameters"] / training["parameters"]
    return Gradients(training["reach"], trained if training["method"] in REPLACED_METHODS else 0.0)
