"""Random models of a size that vLLM computes on a CPU, and adapters for them."""

from pathlib import Path

from tests.tiny import make_model, save_model

# vLLM's attention on a CPU has heads of 32 values and more.
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}


def make_base(folder: Path) -> Path:
    """Save the base model."""
    return save_model(folder, **SHAPE)


def make_adapter(folder: Path, seed: int, rank: int = 4) -> Path:
    """Save an adapter with random weights, which answers differently from the base model."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_model(**SHAPE), LoraConfig(r=rank, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(seed)
    for name, weights in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weights, std=0.5)
    model.save_pretrained(folder)
    return folder
