"""A random-weight Llama of a few thousand parameters and its byte-level tokenizer, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(
    merges: tuple[tuple[str, str], ...] = (), pre_tokenizer: Any = None, ignore_merges: bool = False
) -> PreTrainedTokenizerFast:
    """Return a tokenizer that knows every byte, the two marks of the chat template and these merges.

    Two marks and 256 bytes are 258 tokens; each merge makes one more.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|im_start|>": 0, "<|im_end|>": 1, **{byte: n + 2 for n, byte in enumerate(alphabet)}}
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges), ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(seed: int = 0, model_type: str = "llama", **changes: Any) -> PreTrainedModel:
    """Return a random model with grouped-query attention and tied embeddings, as the default base has."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    shape = {
        "vocab_size": 258,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    config = AutoConfig.for_model(model_type, **{**shape, **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def save_model(folder: Path, seed: int = 0, merges: tuple[tuple[str, str], ...] = (), **changes: Any) -> Path:
    """Save the tiny model with its tokenizer as a model folder."""
    make_model(seed, vocab_size=258 + len(merges), **changes).save_pretrained(folder)
    make_tokenizer(merges).save_pretrained(folder)
    return folder
