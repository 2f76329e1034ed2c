"""Known model families with tiny random models, and a project with one, as `split` leaves it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stages.common.artifacts import write_json
from stages.common.messages import Message
from stages.common.records import make_row, write_rows
from tests.stages.common.chat_templates import FAMILIES, make_family_tokenizer
from tests.stages.common.sentencepiece import make_learned_tokenizer

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
LLAMA_3_ROTATION = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GPT_2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.3}
GEMMA = {"sliding_window": 512, "query_pre_attn_scalar": 16}
GEMMA_3 = GEMMA | {"num_hidden_layers": 6}  # the sixth is of full attention
NESTED = {"text_config": TEXT | GEMMA_3, "vision_config": VISION, "mm_tokens_per_image": 1}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
GRANITE = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 1.5,
}

EVERY_PART = ("attention", "linear layers", "norms")


@dataclass(frozen=True)
class Known:
    """A family, its model of a few thousand weights, and what is promised of it; tests hold each promise.

    Attributes:
        models: of the family, as people call them.
        template: a key of `FAMILIES`.
        fast: which parts of a training step have the fast path on a CPU.
        gguf: whether GGUF and llama.cpp know the architecture.
        paged, openvino: whether that engine computes it from its GGUF.
        adapters: whether vLLM's own list of models has adapters for it.
        stripping: of the models, those whose tokenizer strips blanks after control tokens; no GGUF says so.
        sentencepiece: of the models, those whose tokenizer is of SentencePiece, which openvino cannot read.
    """

    models: str
    template: str
    model_type: str
    settings: dict[str, Any]
    fast: tuple[str, ...] = EVERY_PART
    gguf: bool = True
    paged: bool = True
    openvino: bool = False
    adapters: bool = True
    stripping: str | None = None
    sentencepiece: str | None = None


KNOWN = {
    "llama": Known(
        "Llama 2 and 3.0, SmolLM 1 and 2", "llama-3", "llama", TEXT, openvino=True, sentencepiece="Llama 2"
    ),
    "llama3": Known("Llama 3.1 to 3.3", "llama-3", "llama", TEXT | {"rope_parameters": LLAMA_3_ROTATION}),
    "qwen2": Known("Qwen 2 and 2.5", "qwen-2.5", "qwen2", TEXT, openvino=True),
    "qwen3": Known("Qwen 3", "qwen-3", "qwen3", TEXT, openvino=True),
    "qwen3-moe": Known("Qwen 3 with experts", "qwen-3", "qwen3_moe", TEXT | EXPERTS, paged=False),
    "mistral": Known(
        "Mistral 7B and Nemo", "mistral-3", "mistral", TEXT, openvino=True, sentencepiece="Mistral 7B"
    ),
    "gemma2": Known("Gemma 2", "gemma-2", "gemma2", TEXT | GEMMA, paged=False),
    "gemma3-text": Known("Gemma 3 270M and 1B", "gemma-3", "gemma3_text", TEXT | GEMMA_3),
    "gemma3": Known("Gemma 3 from 4B on (text)", "gemma-3", "gemma3", NESTED, paged=False),
    "phi3": Known("Phi 3 mini (4k), Phi 4", "phi-3", "phi3", TEXT, stripping="Phi 3"),
    "smollm3": Known("SmolLM 3", "smollm-3", "smollm3", TEXT | {"num_hidden_layers": 4}),
    "granite": Known("Granite 3", "granite", "granite", TEXT | GRANITE),
    "olmo2": Known("OLMo 2", "olmo-2", "olmo2", TEXT),
    # Its layers drop a part of their activations while training, in each row another: no prefix is shared.
    "gpt2": Known("GPT-2", "gpt-2", "gpt2", GPT_2, ("linear layers",), paged=False, adapters=False),
    "gpt-neox": Known(
        "GPT-NeoX, Pythia",
        "chatml",
        "gpt_neox",
        TEXT,
        ("attention", "linear layers"),
        gguf=False,
        paged=False,
        adapters=False,
    ),
}


def build_config(family, size, **ids):
    """Return the configuration of a family's tiny model with a vocabulary of `size` tokens."""
    from transformers import AutoConfig

    settings = KNOWN[family].settings
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **ids}
    words = {"vocab_size": size, **ids}
    if "text_config" in settings:
        settings = {**settings, **ids, "text_config": settings["text_config"] | words}
    else:
        settings = {**settings, **words}
    return AutoConfig.for_model(KNOWN[family].model_type, **settings)


def build_model(config, seed=0):
    """Return a random model whose norms and biases are random, too."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.dim() == 1:
                weights.add_(torch.randn_like(weights), alpha=0.2 if "bias" in name else 0.1)
    return model


def round_weights(model):
    """Round the weights to float16, which a GGUF holds exactly; not what is computed, such as frequencies."""
    for weights in model.parameters():
        weights.data = weights.data.half().float()
    return model


def make_base(folder, family, blanks=None):
    """Save a random model of a family with a tokenizer of its tokens and template.

    Args:
        blanks: how a SentencePiece tokenizer treats them, one of `STYLES`; None: the tokenizer is byte-level.
    """
    described = FAMILIES[KNOWN[family].template]
    tokenizer = make_learned_tokenizer(blanks, described) if blanks else make_family_tokenizer(described)
    tokenizer.pad_token = tokenizer.eos_token
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    build_model(build_config(family, len(tokenizer), **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def takes_system(family):
    return FAMILIES[KNOWN[family].template].takes_system


def row(question, answer, system=None):
    messages = [Message("system", system)] if system else []
    return make_row([*messages, Message("user", question), Message("assistant", answer)], "toy", "cc0-1.0")


def write_project(family, make_row, kind="json", blanks=None, **changes):
    """Write a family's model, 24, 4 and 8 rows of the sides, and parameters, changed as `section__key=value`.

    Args:
        make_row: from a number to the row.
    """
    make_base(Path("artifacts/fetch_base"), family, blanks)
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
