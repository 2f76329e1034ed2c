"""Check before the costly stages what `finetune` would refuse: the method, the adapter to start from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.common.errors import InputError
from stages.common.machine.devices import check_batch_size, check_devices, inspect_host
from stages.common.model.adapter import (
    HEAD,
    LORA_METHODS,
    PROMPT_METHODS,
    REPLACED_METHODS,
    STARTED_METHODS,
    describe_missing_start,
    find_files,
    find_start,
    read_initial_adapter,
)
from stages.common.model.label_head import check_labels, count_head_weights
from stages.common.model.loading import (
    count_parameters,
    load_tokenizer,
    make_empty,
    pick_device,
    read_position_limit,
)
from stages.common.model.nf4 import check_nf4
from stages.common.model.replaced import (
    check_not_quantized,
    check_shardable,
    measure_reach,
    select_weights,
)
from stages.common.model.targets import (
    ALL_LINEAR,
    check_experts,
    check_rank,
    check_targets,
    configure_lora,
    list_experts,
)
from stages.common.model.teacher import check_same_tokens, find_teacher
from stages.common.model.virtual_tokens import check_count, check_init_text, check_keys, count_values
from stages.common.storage.remote_folder import RemoteFolder
from stages.preflight.memory_checks import (
    Training,
    find_memory_problems,
    find_memory_problems_of_teacher,
)

if TYPE_CHECKING:
    from stages.common.params.finetune import Finetune
    from stages.common.task.protocol import Task

# Of a trained weight: three checkpoints of it and its two averages in float32, and the adapter itself.
DISK_BYTES = 3 * 12 + 4
BEST_BYTES = 4 * 4  # and with early stopping, of four copies of the best weights: one, and one a checkpoint

# A peak rate above it is one for adapters: a training of the weights themselves mostly diverges.
HIGH_RATE = 5e-4


def count_training(config: Any, finetune: Finetune, labels: Sequence[str] = ()) -> Training:
    """Return what a method trains of a base model, from the shapes of its weights.

    Args:
        labels: of the task, for the method head.

    Raises:
        InputError: the method cannot train this model; the message names the key of `finetune`.
    """
    if finetune.method in REPLACED_METHODS:
        check_not_quantized(config, finetune.method)
    if finetune.method == "qlora":
        check_nf4(config, pick_device().type)
    model = make_empty(config)
    if finetune.sharding == "full":
        check_shardable(model, ())
    shapes = {name: weights.numel() for name, weights in model.named_parameters()}
    if finetune.method in LORA_METHODS:
        check_rank(getattr(config.get_text_config(), "hidden_size", None), finetune.rank)
        check_targets(model, finetune.target_modules)
        check_experts(model, finetune.target_modules, finetune.method, finetune.dropout)
        quantized = sum(m.weight.numel() for m in _list_targets(model, ALL_LINEAR))
        added = _count_adapter(model, finetune)
        in_4_bits = quantized if finetune.method == "qlora" else 0
        return Training(finetune.method, sum(shapes.values()), added, 1.0, in_4_bits)
    if finetune.method in PROMPT_METHODS:
        check_count(read_position_limit(config), finetune.num_virtual_tokens)
        check_keys(model, finetune.method)
        added = finetune.num_virtual_tokens * count_values(config, finetune.method)
        return Training(finetune.method, sum(shapes.values()), added, 1.0)
    if finetune.method == HEAD:
        check_labels(labels)
        return Training(finetune.method, sum(shapes.values()), count_head_weights(config, len(labels)), 0.0)
    chosen = select_weights(model, finetune.trained_modules if finetune.method == "partial" else None)
    reach = measure_reach(model, chosen)
    return Training(finetune.method, sum(shapes.values()), sum(shapes[name] for name in chosen), reach)


def _list_targets(model: Any, targets: str | Sequence[str]) -> list[Any]:
    """Return the modules that get an adapter, as peft finds them."""
    modules = dict(model.named_modules())
    if model.config.get_text_config() is not model.config:  # it reads pictures, too, which rows do not have
        decoder = next(name for name, module in modules.items() if module is model.get_decoder())
        modules = {name: module for name, module in modules.items() if name.startswith(f"{decoder}.")}
    matrices = {name: m for name, m in modules.items() if getattr(getattr(m, "weight", None), "ndim", 0) == 2}
    linear = {name: m for name, m in matrices.items() if type(m).__name__ in ("Linear", "Conv1D")}
    if targets == ALL_LINEAR:
        return [module for module in linear.values() if module is not model.get_output_embeddings()]
    if isinstance(targets, str):
        return [module for name, module in matrices.items() if re.fullmatch(targets, name)]
    return [m for name, m in matrices.items() if any(name == t or name.endswith(f".{t}") for t in targets)]


def _count_adapter(model: Any, finetune: Finetune) -> int:
    """Return the weights of an adapter of a base model, which may be changed.

    What peft does to experts is its own business, so it is asked; without experts its import is not needed.
    """
    if not list_experts(model):
        return sum(_count_added(module, finetune) for module in _list_targets(model, finetune.target_modules))
    import torch
    from peft import get_peft_model

    with torch.device("meta"):
        config = configure_lora(
            model,
            finetune.method,
            finetune.rank,
            finetune.alpha,
            finetune.dropout,
            finetune.target_modules,
        )
        adapted = get_peft_model(model, config)
    return sum(weights.numel() for weights in adapted.parameters() if weights.requires_grad)


def _count_added(module: Any, finetune: Finetune) -> int:
    rows, columns = module.weight.shape
    outputs = columns if type(module).__name__ == "Conv1D" else rows
    return int(finetune.rank * (rows + columns) + (outputs if finetune.method == "dora" else 0))


def find_finetune_problems(
    config: Any, finetune: Finetune, tokenizer: Any, labels: Sequence[str] = ()
) -> tuple[Training | None, list[InputError]]:
    """Return what is trained, and why it cannot be, or not from the adapter or the text to start from."""
    training, problems = find_method_problems(config, finetune, labels)
    teacher, of_teacher = find_teacher_problems(finetune, tokenizer)
    if teacher:
        weights = count_parameters(teacher)
        of_teacher = find_memory_problems_of_teacher(weights, finetune, training)
        training = replace(training, teacher_parameters=weights) if training else None
    others = [
        *find_adapter_problems(finetune, labels),
        *find_init_problems(tokenizer, finetune),
        *of_teacher,
        *find_store_problems(finetune.checkpoint_url),
        *find_device_problems(finetune),
    ]
    return training, problems + others


def find_method_problems(
    config: Any, finetune: Finetune, labels: Sequence[str] = ()
) -> tuple[Training | None, list[InputError]]:
    """Return what is trained, and why the model of a configuration cannot be trained so, or not here.

    The weights are not read.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None, [
            InputError(
                f"the base model is of the type {config.model_type}, which transformers does not load as a "
                "causal language model",
                "choose a decoder for text with a chat template (fetch_base in params.yaml)",
            )
        ]
    try:
        training = count_training(config, finetune, labels)
    except InputError as error:
        return None, [error]
    return training, find_memory_problems(training, finetune)


def find_adapter_problems(finetune: Finetune, labels: Sequence[str] = ()) -> list[InputError]:
    """Return why training cannot start from the initial adapter; none where there is no adapter."""
    try:
        find_start(finetune.warm_start_from, finetune, labels)
    except InputError as error:
        return [error]
    return []


def find_init_problems(tokenizer: Any, finetune: Finetune) -> list[InputError]:
    """Return why virtual tokens cannot be initialized from the text of params.yaml."""
    if finetune.method != "prompt_tuning" or finetune.prompt_tuning_init_text is None:
        return []
    try:
        check_init_text(tokenizer, finetune.prompt_tuning_init_text, finetune.num_virtual_tokens)
    except InputError as error:
        return [error]
    return []


def find_stopping_problems(finetune: Finetune, task: Task, answers: Sequence[str]) -> list[InputError]:
    """Return why early stopping cannot decide: no validation rows, or a metric that they do not have.

    Args:
        answers: of the validation rows that fit.
    """
    if finetune.early_stopping is None:
        return []
    if not answers:
        return [
            InputError(
                "finetune.early_stopping is set, and there are no validation rows",
                "raise split.validation_fraction, or set finetune.early_stopping: null",
            )
        ]
    try:
        chosen = answers[: finetune.validation_rows]
        task.check_comparable(chosen, finetune.early_stopping.metric, "finetune.early_stopping.metric")
    except InputError as error:
        return [error]
    return []


def find_teacher_problems(finetune: Finetune, tokenizer: Any) -> tuple[Path | None, list[InputError]]:
    """Return the folder of the teacher, which is fetched if need be, and why it cannot teach this model."""
    if finetune.taught_by is None:
        return None, []
    try:
        folder = find_teacher(finetune.taught_by)
        if finetune.distill == "logits":
            check_same_tokens(load_tokenizer(folder), tokenizer, finetune.taught_by)
    except InputError as error:
        return None, [error]
    return folder, []


def find_store_problems(url: str | None) -> list[InputError]:
    """Return why checkpoints cannot be copied to a URL, after a small file was written there and deleted."""
    if url is None:
        return []
    try:
        RemoteFolder(url).check_writable()
    except InputError as error:
        return [error]
    return []


def find_device_problems(finetune: Finetune) -> list[InputError]:
    """Return whether this host has fewer devices than the stage would start processes, or a batch fewer rows.

    Other launchers train elsewhere, too: `finetune` asks them, before it reads anything.
    """
    if finetune.launcher != "local" or finetune.devices == "auto":
        return []
    try:
        check_devices(finetune.devices, inspect_host(), f"finetune.devices is {finetune.devices}")
        check_batch_size(finetune.batch_size, finetune.devices)
    except InputError as error:
        return [error]
    return []


def describe_high_rate(finetune: Finetune) -> str | None:
    """Return a warning where the learning rate is one for adapters that learn answers, as of lora."""
    starts = _starts_from_adapter(finetune)
    rate = finetune.learning_rate * (finetune.warm_start_rate_factor if starts else 1)
    if rate <= HIGH_RATE:
        return None
    factor = f" times finetune.warm_start_rate_factor ({rate:g})" if starts else ""
    if finetune.method in STARTED_METHODS:
        return (
            f"finetune.learning_rate is {finetune.learning_rate:g}{factor}, a rate for learning answers: "
            f"with finetune.method {finetune.method} all of them may become unlikely; 0.00005 is a usual "
            "start"
        )
    if finetune.method not in REPLACED_METHODS:
        return None
    return (
        f"finetune.learning_rate is {finetune.learning_rate:g}{factor}, a rate for adapters: with "
        f"finetune.method {finetune.method} the loss will probably diverge; 0.00005 is a usual start"
    )


def list_warnings(finetune: Finetune) -> list[str]:
    """Return what is allowed and will probably go wrong."""
    missing = [describe_missing_start(finetune.method)] if has_no_start(finetune) else []
    return [*filter(None, [describe_high_rate(finetune)]), *missing]


def has_no_start(finetune: Finetune) -> bool:
    """Return whether a method that improves a trained model would start from the base model."""
    folder = finetune.warm_start_from
    return finetune.method in STARTED_METHODS and (folder is None or find_files(Path(folder)) is None)


def _starts_from_adapter(finetune: Finetune) -> bool:
    try:
        return bool(finetune.warm_start_from and read_initial_adapter(Path(finetune.warm_start_from)))
    except InputError:  # which find_adapter_problems reports
        return False


def count_checkpoint_bytes(training: Training | None, finetune: Finetune) -> int:
    """Return the space on the disk for the checkpoints of a training and for what it trains."""
    each = DISK_BYTES + (BEST_BYTES if finetune.early_stopping else 0)
    return each * training.trained_parameters if training else 0
