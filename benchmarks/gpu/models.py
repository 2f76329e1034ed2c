"""Random models of known architectures, and random rows for them: speed does not depend on the weights."""

from __future__ import annotations

import json
import random
from itertools import islice, product
from pathlib import Path
from typing import Any

from stages.common.artifacts import artifacts, write_json
from stages.common.chat.template import Encoded
from stages.common.messages import Message
from stages.common.params.loading import load_params
from stages.common.records import Row, make_row, write_rows
from stages.common.task.kinds import TASK_FILE
from stages.finetune.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "qwen3-4b": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}
# vLLM's attention on a CPU has heads of 32 values and more.
TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
SEED = 7


def make_config(name: str, tiny: bool, **changes: Any) -> Any:
    """Return the configuration of an architecture; tiny: the same kind of layers, few and narrow."""
    from transformers import AutoConfig

    shape = {**ARCHITECTURES[name], **(TINY if tiny else {}), **changes}
    kind = shape.pop("model_type")
    return AutoConfig.for_model(kind, bos_token_id=0, eos_token_id=1, pad_token_id=1, **shape)


def make_model(config: Any, dtype: Any, device: Any, seed: int = SEED) -> Any:
    """Return a model with random weights, made where it computes."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.to(device)


def make_rows(tokens: int, words: int, longest: int) -> list[Encoded]:
    """Return rows of random tokens, so many in all: their lengths are log-normal, half of each is learned."""
    rng, rows, total = random.Random(SEED), list[Encoded](), 0
    while total < tokens:
        length = min(longest, max(longest // 32, int(rng.lognormvariate(0.0, 0.8) * longest / 5)))
        rows.append(Encoded([rng.randrange(2, words) for _ in range(length)], max(2, length // 2)))
        total += length
    return rows


def make_recipe(**changes: Any) -> Recipe:
    """Return the recipe of params.yaml with the rate of a large model, and changes."""
    values = load_params(ROOT / "params.yaml").finetune.model_dump()
    values |= {"learning_rate": 2e-4, "epochs": 1, "gradient_accumulation": 1, **changes}
    return Recipe(**{name: values[name] for name in Recipe.__dataclass_fields__ if name in values})


def make_tokenizer(words: int) -> Any:
    """Return a tokenizer of so many tokens: the bytes, two marks, and pairs of bytes."""
    from tokenizers import pre_tokenizers

    from tests.tiny import make_tokenizer as make_of_bytes

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return make_of_bytes(tuple(islice(product(alphabet, alphabet), words - 258)))


def make_tiny_split(folder: Path) -> None:
    """Write what `finetune` and later stages read: a tiny random model, rows, and the kind of the task."""

    def make(number: int) -> Row:
        question, answer = f"question {number} of {number % 7}", json.dumps({"n": number % 5})
        return make_row([Message("user", question), Message("assistant", answer)], "toy", "cc0-1.0")

    base = folder / artifacts("fetch_base")
    make_model(make_config("llama-8b", tiny=True), "float32", "cpu").save_pretrained(base)
    make_tokenizer(512).save_pretrained(base)
    for name, numbers in (("train", range(48)), ("validation", range(1000, 1008))):
        write_rows(folder / artifacts("split") / f"{name}.parquet", [make(number) for number in numbers])
    write_json(folder / TASK_FILE, {"kind": "json", "label_key": None})
