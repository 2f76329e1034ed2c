"""The architectures of llama.cpp that compute what models of transformers compute.

llama.cpp has the arithmetic built in, and only a few numbers of it are settings of a GGUF file. A model that
differs in anything else loads there and answers otherwise, without an error. So each architecture here names
what it takes for granted, and a model that differs is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from stages.common.errors import InputError
from stages.common.gguf.vocabulary import FIX

if TYPE_CHECKING:
    from gguf import GGUFWriter

TorchTensor = Any  # torch.Tensor, which is imported only where it is needed
Change = Callable[[TorchTensor], TorchTensor]
# The name of a tensor as transformers has it, and how it is laid out in GGUF.
Part = tuple[str, Change]

SILU = ("silu", "swish")
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")  # llama.cpp has no exact GELU here


def _keep(tensor: TorchTensor) -> TorchTensor:
    return tensor


def _keep_all(config: Any, key: str) -> list[Part]:
    return [(key, _keep)]


def _find_nothing(config: Any) -> Iterator[str]:
    yield from ()


def _add_nothing(writer: GGUFWriter, config: Any) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Architecture:
    """What llama.cpp computes under one name.

    Attributes:
        name: in GGUF.
        activations: of the feed-forward layers.
        rotations: how positions may be scaled.
        find_differences: yields what a model has and this arithmetic does not.
        split: from the name of a tensor to its parts in GGUF.
        add_settings: writes what only this architecture has.
    """

    name: str
    activations: tuple[str, ...] = SILU
    rotations: tuple[str, ...] = ("default",)
    find_differences: Callable[[Any], Iterator[str]] = _find_nothing
    split: Callable[[Any, str], list[Part]] = _keep_all
    add_settings: Callable[[GGUFWriter, Any], None] = _add_nothing


def find_architecture(config: Any) -> Architecture:
    """Return the GGUF architecture for a model of this configuration; of one with pictures, for its text.

    Raises:
        InputError: no architecture is known to compute the same.
    """
    config = config.get_text_config()
    kind = config.model_type
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"the base model's architecture {kind!r} has no GGUF export (known: {known})", FIX)
    found = ARCHITECTURES[kind]
    if (activation := read_activation(config)) not in found.activations:
        raise InputError(
            f"the base model's activation {activation!r} is not GGUF's {found.activations[0]}", FIX
        )
    rope = read_rotation(config)
    if rope.get("rope_type", "default") not in found.rotations:
        raise InputError(
            f"the base model scales its positions by {rope['rope_type']!r}, which the GGUF export of {kind} "
            f"does not know (it knows {', '.join(found.rotations)})",
            FIX,
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError("the base model rotates only a part of each head", FIX)
    if differences := list(found.find_differences(config)):
        raise InputError(
            f"the base model differs from llama.cpp's {found.name}: {'; '.join(differences)}", FIX
        )
    return found


def read_activation(config: Any) -> str:
    """Return the activation of the feed-forward layers, of which each family has its own key."""
    names = ("hidden_activation", "hidden_act", "activation_function")
    return next(str(value) for name in names if (value := getattr(config, name, None)))


def read_rotation(config: Any) -> dict[str, Any]:
    """Return the settings of the rotary embedding; empty where positions are learned.

    Gemma 3 has one for each kind of layer; this is the one of full attention.
    """
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    full: dict[str, Any] = rope.get("full_attention", rope)
    return full


def get_head_size(config: Any) -> int:
    """Return the number of values of one head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _pair_halves(config: Any, key: str) -> list[Part]:
    """Llama's order in GGUF: adjacent values are rotated; in transformers the two halves of a head."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((heads[name] for name in heads if f".{name}." in key), None)
    return [(key, partial(_interleave, count) if count else _keep)]


def _interleave(heads: int, tensor: TorchTensor) -> TorchTensor:
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _add_one_to_norms(config: Any, key: str) -> list[Part]:
    """Gemma multiplies by 1 + weight; GGUF contains the sum."""
    return [(key, (lambda tensor: tensor + 1) if key.endswith("norm.weight") else _keep)]


def _transpose_layers(config: Any, key: str) -> list[Part]:
    """GPT-2 keeps its linear layers as [inputs, outputs]."""
    turned = ".h." in key and key.endswith(".weight")
    return [(key, (lambda tensor: tensor.t()) if turned and ".ln_" not in key else _keep)]


def _split_experts(config: Any, key: str) -> list[Part]:
    """Gates and up-projections of all experts are one tensor in transformers, and two in GGUF."""
    size = config.moe_intermediate_size
    if key.endswith(".experts.gate_up_proj"):
        stem = key.removesuffix("gate_up_proj")
        return [
            (f"{stem}gate_proj.weight", lambda tensor: tensor[:, :size]),
            (f"{stem}up_proj.weight", lambda tensor: tensor[:, size:]),
        ]
    return [(f"{key}.weight" if key.endswith(".experts.down_proj") else key, _keep)]


def _add_experts(writer: GGUFWriter, config: Any) -> None:
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _compare_experts(config: Any) -> Iterator[str]:
    if not config.norm_topk_prob:
        yield "norm_topk_prob is false"
    if config.decoder_sparse_step != 1 or config.mlp_only_layers:
        yield "not all layers have experts"


def _add_granite(writer: GGUFWriter, config: Any) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def _find_biases(config: Any) -> Iterator[str]:
    if config.attention_bias or getattr(config, "mlp_bias", False):
        yield "its linear layers have biases"


def _compare_smollm3(config: Any) -> Iterator[str]:
    yield from _find_biases(config)
    every_fourth = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
    if list(config.no_rope_layers) != every_fourth:
        yield "the layers without positions are not every fourth"


def _compare_gpt2(config: Any) -> Iterator[str]:
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        yield "attention is scaled by another number than the size of a head"
    if config.add_cross_attention:
        yield "it has cross attention"


# Layers of the largest Gemma 2 and 3, whose attention llama.cpp scales by the width of the model.
_WIDE_GEMMA = {"gemma2": 46, "gemma3_text": 62}
_PATTERN = {"gemma2": 2, "gemma3_text": 6}


def _compare_gemma(config: Any) -> Iterator[str]:
    yield from _find_biases(config)
    kind, layers = config.model_type, config.num_hidden_layers
    wide = layers == _WIDE_GEMMA[kind]
    scale = config.hidden_size // config.num_attention_heads if wide else config.head_dim
    if config.query_pre_attn_scalar != scale:
        yield f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, not {scale}"
    full = [kind == "full_attention" for kind in config.layer_types]
    if full != [(layer + 1) % _PATTERN[kind] == 0 for layer in range(layers)]:
        yield f"the layers of full attention are not every {_PATTERN[kind]}th"
    if config.use_bidirectional_attention:
        yield "its attention looks ahead"


def _compare_gemma2(config: Any) -> Iterator[str]:
    yield from _compare_gemma(config)
    if not config.attn_logit_softcapping or not config.final_logit_softcapping:
        yield "attn_logit_softcapping or final_logit_softcapping is null"


def _compare_gemma3(config: Any) -> Iterator[str]:
    yield from _compare_gemma(config)
    if config.attn_logit_softcapping or config.final_logit_softcapping:
        yield "its logits are capped"
    sliding = config.rope_parameters["sliding_attention"]
    if sliding["rope_type"] != "default" or sliding["rope_theta"] != 10_000.0:
        yield "positions of sliding attention have another base than 10,000, or are scaled"


def _add_gemma2(writer: GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _add_gemma3(writer: GGUFWriter, config: Any) -> None:
    from gguf import RopeScalingType

    writer.add_sliding_window(config.sliding_window)
    rope = read_rotation(config)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


_LLAMA = Architecture("llama", rotations=("default", "llama3"), split=_pair_halves)
# model_type of transformers → architecture of GGUF.
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture(
        "qwen3moe", find_differences=_compare_experts, split=_split_experts, add_settings=_add_experts
    ),
    "gemma2": Architecture(
        "gemma2",
        TANH_GELU,
        find_differences=_compare_gemma2,
        split=_add_one_to_norms,
        add_settings=_add_gemma2,
    ),
    "gemma3_text": Architecture(
        "gemma3",
        TANH_GELU,
        ("default", "linear"),
        find_differences=_compare_gemma3,
        split=_add_one_to_norms,
        add_settings=_add_gemma3,
    ),
    "phi3": Architecture("phi3"),
    "smollm3": Architecture("smollm3", find_differences=_compare_smollm3, split=_pair_halves),
    "granite": Architecture(
        "granite", find_differences=_find_biases, split=_pair_halves, add_settings=_add_granite
    ),
    "olmo2": Architecture("olmo2", find_differences=_find_biases),
    "gpt2": Architecture("gpt2", TANH_GELU, find_differences=_compare_gpt2, split=_transpose_layers),
}
