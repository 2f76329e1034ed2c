"""The section `finetune` of `params.yaml`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator
from pydantic_core import PydanticCustomError
from typing_extensions import override

from stages.common.model.adapter import (
    PREFERENCE_METHODS,
    PROMPT_METHODS,
    SHARDED_METHODS,
    TAUGHT_METHODS,
    describe_unsharded,
)
from stages.common.params.checked_yaml import Section
from stages.common.params.types import AUTO, AutoCount, NotNegative, Positive, PositiveCount, Seed, Share
from stages.common.storage.remote_folder import find_url_problem


def _check_trained_modules(value: Any) -> Any:
    if type(value) is int and value >= 1:
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(name, str) and name for name in value):
        return tuple(value)
    raise PydanticCustomError(
        "trained_modules", "must be a whole number of at least 1 or a list of module names"
    )


# The last so many transformer blocks, or modules by their names.
TrainedModules = Annotated[int | tuple[str, ...], PlainValidator(_check_trained_modules)]


Method = Literal[
    "lora",
    "rslora",
    "dora",
    "qlora",
    "full",
    "partial",
    "prompt_tuning",
    "prefix_tuning",
    "head",
    "dpo",
    "orpo",
    "kto",
    "distill",
    "grpo",
]


class EarlyStopping(Section):
    """When a training ends early: after `patience` points that are no better than the best before them."""

    metric: Annotated[str, Field(min_length=1)]
    patience: PositiveCount


class Rewards(Section):
    """What a sampled answer is worth that passes a check."""

    valid: NotNegative = 0.25
    schema_: NotNegative = Field(default=0.25, alias="schema")
    match: NotNegative = 1.0


class Finetune(Section):
    """How the adapter is trained."""

    # One folder only: DVC watches it.
    warm_start_from: Literal["artifacts/initial_adapter"] | None = "artifacts/initial_adapter"
    replay_share: Share = 1.0
    warm_start_rate_factor: Positive = 1.0
    method: Method = "lora"
    trained_modules: TrainedModules = 4
    rank: PositiveCount
    alpha: Positive
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)]
    target_modules: str | tuple[str, ...]
    beta: Positive = 0.1
    desirable_weight: Positive = 1.0
    undesirable_weight: Positive = 1.0
    held_out_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    num_virtual_tokens: PositiveCount = 20
    prompt_tuning_init: Literal["random", "sample_vocab", "text"] = "random"
    prompt_tuning_init_text: Annotated[str, Field(min_length=1)] | None = None
    prefix_tuning_init: Literal["random", "zero"] = "random"
    teacher: Annotated[str, Field(min_length=1)] | None = None
    distill: Literal["logits", "answers"] = "logits"
    teacher_weight: Share = 0.5
    temperature: Positive = 1.0
    group_size: Annotated[int, Field(ge=2)] = 8
    rewards: Rewards = Rewards()
    kl_weight: NotNegative = 0.0
    epsilon: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    learning_rate: Positive
    schedule: Literal["cosine", "linear", "constant"]
    warmup_fraction: Share
    weight_decay: NotNegative
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)]
    max_grad_norm: Positive
    batch_size: PositiveCount
    gradient_accumulation: PositiveCount
    epochs: PositiveCount
    max_length: PositiveCount
    on_long_row: Literal["drop", "stop"]
    validate_every: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    validation_rows: PositiveCount = 32
    early_stopping: EarlyStopping | None = None
    checkpoint_every_steps: PositiveCount
    checkpoint_url: str | None = None
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    dtype: Literal["auto", "bfloat16", "float32"]
    devices: AutoCount = AUTO
    sharding: Literal["none", "full", "auto"] = "auto"
    launcher: Literal["local", "torchrun", "ray"] = "local"
    seed: Seed

    @override
    def find_conflicts(self) -> Iterator[tuple[str, str]]:
        if self.checkpoint_url is not None and (problem := find_url_problem(self.checkpoint_url)):
            yield "checkpoint_url", problem
        if self.early_stopping and self.validate_every is None:
            yield "early_stopping", "needs validate_every, which is null: there would be no points to compare"
        if self.method in PREFERENCE_METHODS and self.dropout:
            yield (
                "dropout",
                f"must be 0 with method: {self.method}, which compares the probability of answers between "
                "model and reference, or between answers: dropout would be noise in it",
            )
        if self.method == "grpo" and self.dropout:
            yield "dropout", "must be 0 with method: grpo, whose answers are sampled without it"
        if self.method == "grpo" and not any(self.rewards.model_dump().values()):
            yield "rewards", "are all 0: no answer would be better than another"
        if self.sharding == "full" and self.method not in SHARDED_METHODS:
            yield "sharding", f"must be none or auto with method: {self.method}: {describe_unsharded()}"
        elif self.sharding == "full" and self.taught_by:
            yield "sharding", "must be none or auto with a teacher, of which every process has the whole"
        if self.method == "distill" and self.teacher is None:
            yield "teacher", "must be set with method: distill: a folder with a model, or a hub id"
        if self.method == "kto" and self.batch_size < 2:
            yield (
                "batch_size",
                "must be 2 or more with method: kto, which estimates how far the model has moved from the "
                "answers of the other rows of a batch; raise it, and lower gradient_accumulation by as much",
            )
        if self.method == "prefix_tuning" and self.gradient_checkpointing is True:
            yield (
                "gradient_checkpointing",
                "must be auto or false with method: prefix_tuning: a layer that is computed again reads no "
                "keys and values but its own, and the prefix is others",
            )
        if self.prompt_tuning_init == "text" and self.prompt_tuning_init_text is None:
            yield "prompt_tuning_init", "is text, and prompt_tuning_init_text is null: write the text there"
        if self.prompt_tuning_init != "text" and self.prompt_tuning_init_text is not None:
            yield "prompt_tuning_init_text", "is set, and only prompt_tuning_init: text reads it"

    @property
    def taught_by(self) -> str | None:
        """Return the name of the teacher that is learned from; None where there is none."""
        return self.teacher if self.method in TAUGHT_METHODS else None

    @property
    def virtual_tokens(self) -> int:
        """Return how many virtual tokens come before every text; 0 where the method learns none."""
        return self.num_virtual_tokens if self.method in PROMPT_METHODS else 0
