"""A project with a tiny random model of a known family, as `split` leaves it."""

from pathlib import Path

import yaml

from stages.common.artifacts import write_json
from stages.common.messages import Message
from stages.common.records import make_row, write_rows
from tests.stages.common.chat_templates import FAMILIES, make_family_tokenizer

ROOT = Path(__file__).parents[2]
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # with small weights all tokens are nearly as likely
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
GPT_2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
GEMMA = {"sliding_window": 512, "query_pre_attn_scalar": 16}
NESTED = {"text_config": TEXT | GEMMA, "vision_config": VISION, "mm_tokens_per_image": 1}

# The chat template, transformers' model type, its settings, and whether GGUF knows the architecture.
KNOWN = {
    "llama": ("llama-3", "llama", TEXT, True),
    "qwen2": ("qwen-2.5", "qwen2", TEXT, True),
    "qwen3": ("qwen-3", "qwen3", TEXT, True),
    "mistral": ("mistral-3", "mistral", TEXT, True),
    "gemma2": ("gemma-2", "gemma2", TEXT | GEMMA, False),
    "gemma3-text": ("gemma-3", "gemma3_text", TEXT | GEMMA, False),
    "gemma3": ("gemma-3", "gemma3", NESTED, False),
    "phi3": ("phi-3", "phi3", TEXT, False),
    "gpt2": ("gpt-2", "gpt2", GPT_2, False),
}


def make_base(folder, family):
    """Save a random model of a family with a byte-level tokenizer of its tokens and template."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    template, model_type, settings, _ = KNOWN[family]
    tokenizer = make_family_tokenizer(FAMILIES[template])
    tokenizer.pad_token = tokenizer.eos_token
    size = len(tokenizer)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    settings = {**settings, **ids}
    if "text_config" in settings:
        settings["text_config"] = settings["text_config"] | ids | {"vocab_size": size}
    else:
        settings["vocab_size"] = size
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def takes_system(family):
    return FAMILIES[KNOWN[family][0]].takes_system


def row(question, answer, system=None):
    messages = [Message("system", system)] if system else []
    return make_row([*messages, Message("user", question), Message("assistant", answer)], "toy", "cc0-1.0")


def write_project(family, make_row, kind="json", **changes):
    """Write a family's model, 24, 4 and 8 rows of the sides, and parameters, changed as `section__key=value`.

    Args:
        make_row: from a number to the row.
    """
    make_base(Path("artifacts/fetch_base"), family)
    sides = {"train": range(24), "validation": range(100, 104), "test": range(200, 208)}
    for side, numbers in sides.items():
        write_rows(Path(f"artifacts/split/{side}.parquet"), [make_row(n) for n in numbers])
    write_json(Path("artifacts/curate/task.json"), {"kind": kind, "label_key": None, "labels": None})
    fetched = {"license": "apache-2.0", "name": "toy", "revision": None, "sha256": "a" * 64}
    write_json(Path("reports/fetch_base/metrics.json"), fetched)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["ask_base"] |= {"max_new_tokens": 16, "engine": "transformers"}
    params["finetune"] |= {"max_length": 200, "rank": 2, "dtype": "float32"}
    params["evaluate"]["resamples"] = 100
    params["task"]["slices"] = []
    for name, value in changes.items():
        section, key = name.split("__")
        params[section][key] = value
    Path("params.yaml").write_text(yaml.safe_dump(params))
