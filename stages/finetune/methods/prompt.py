"""Virtual tokens by peft (methods prompt_tuning and prefix_tuning): learned ones before every text.

Prefix tuning is without peft's projection: only what the projection makes would be saved, so that neither a
resumed training nor one from another adapter could go on.
"""

from __future__ import annotations

from pathlib import Path

from peft import (
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from transformers import set_seed

from stages.common.model.adapter import PEFT, InitialAdapter, check_settings, list_settings
from stages.common.model.loading import (
    load_base,
    load_tokenizer,
    pick_device,
    pick_dtype,
    read_position_limit,
)
from stages.common.model.replaced import read_weights
from stages.common.model.virtual_tokens import PREFIX, check_count, check_init_text, check_keys, read_behind
from stages.finetune.methods.lora import check_tensors, write_adapter
from stages.finetune.recipe import Recipe


def build_prompt(base: Path, recipe: Recipe) -> PeftModel:
    """Load the base model and put virtual tokens before every text, initialized from the seed or a text.

    Raises:
        InputError: the tokens are more than the positions of the model, or fewer than those of the text.
    """
    device = pick_device()
    model = load_base(base, pick_dtype(device, recipe.dtype), device)
    check_count(read_position_limit(model.config), recipe.num_virtual_tokens)
    check_keys(model, recipe.method)
    set_seed(recipe.seed)
    config = _make_prefix_config(recipe) if recipe.method == PREFIX else _make_prompt_config(base, recipe)
    tuned = get_peft_model(model, config)
    # peft takes the first weights with as many rows as there are words for the embedding.
    tuned.word_embeddings = model.get_input_embeddings()
    return read_behind(tuned)


def _make_prefix_config(recipe: Recipe) -> PrefixTuningConfig:
    return PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=recipe.num_virtual_tokens,
        init_weights="zero" if recipe.prefix_tuning_init == "zero" else None,
    )


def _make_prompt_config(base: Path, recipe: Recipe) -> PromptTuningConfig:
    text = recipe.prompt_tuning_init_text if recipe.prompt_tuning_init == "text" else None
    if text is not None:
        check_init_text(load_tokenizer(base), text, recipe.num_virtual_tokens)
    return PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=recipe.num_virtual_tokens,
        prompt_tuning_init=recipe.prompt_tuning_init.upper(),
        prompt_tuning_init_text=text,
        tokenizer_name_or_path=str(base) if text is not None else None,
    )


def load_prompt(model: PeftModel, recipe: Recipe, initial: InitialAdapter) -> None:
    """Replace the virtual tokens of `model` by those of `initial`.

    Raises:
        InputError: the two differ in their settings or tensors; the message has both.
    """
    check_settings(initial, list_settings(recipe))
    weights = read_weights(initial.folder / PEFT.weights)
    check_tensors(get_peft_model_state_dict(model), weights, initial)
    set_peft_model_state_dict(model, weights)


def save_prompt(model: PeftModel, _recipe: Recipe, folder: Path) -> None:
    """Write the virtual tokens as peft reads them, equal ones as equal bytes."""
    write_adapter(model, folder)
