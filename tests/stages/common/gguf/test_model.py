import pytest
import torch
from gguf import GGUFReader

from stages.common.errors import InputError
from stages.common.gguf.architectures import find_architecture
from stages.common.gguf.model import check_tensors, list_tensors, write_gguf
from stages.common.gguf.vocabulary import read_vocabulary
from tests.llama_cpp import LlamaCpp
from tests.stages.families import KNOWN, build_config, build_model, round_weights
from tests.tiny import make_model, make_tokenizer

ROTATION = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# What differs in the arithmetic: order of heads, biases, norms, ties, head sizes, scaled positions.
MODELS = {
    "llama": {},
    "llama_untied_with_biases": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "llama_scaled_positions": {"rope_parameters": LLAMA3},
    "mistral": {"head_dim": 16, "sliding_window": None},
    "qwen2": {},
    "qwen2_untied": {"tie_word_embeddings": False},
    "qwen3": {"head_dim": 16},
}
# Those whose arithmetic has no model above.
FAMILIES = [name for name, known in KNOWN.items() if known.gguf and known.model_type not in MODELS]
PROMPTS = [[0, 40, 41, 42], [2 + (7 * n * n + 3) % 94 for n in range(60)]]


def model_of(name):
    """Return a model whose answers depend on every weight, exact in float16."""
    if name in MODELS:
        shape = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.4}
        model = make_model(3, name.split("_")[0], **shape, **MODELS[name])
    else:
        model = build_model(build_config(name, 260), 3)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if key.endswith("bias"):
                tensor.normal_(std=0.5)
            elif "norm" in key and name in MODELS:
                tensor.uniform_(0.5, 1.5)
        # Never the likeliest: marks and bytes beyond ASCII. llama.cpp gives no logprobs of an end or of half
        # a character.
        model.get_output_embeddings().weight[[0, 1, *range(96, 260)]] = 0
    return round_weights(model)


def write(path, model, quantization="f16"):
    # One merge: llama.cpp reads no vocabulary without.
    vocabulary = read_vocabulary(make_tokenizer((("t", "h"),)), model.config.get_text_config().vocab_size)
    write_gguf(path, model, vocabulary, quantization, "tiny")
    return path


def small(seed, model_type="llama", **changes):
    return make_model(seed, model_type, vocab_size=259, **changes)


def likely(model, prompt):
    with torch.inference_mode():
        return model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)


@pytest.mark.parametrize("name", [*MODELS, *FAMILIES])
def test_llama_cpp_computes_what_transformers_computes(name, tmp_path):
    model = model_of(name)
    llama_cpp = LlamaCpp(write(tmp_path / "model.gguf", model))
    for prompt in PROMPTS:
        expected = likely(model, prompt)
        [found] = llama_cpp.complete(prompt, 1, logprobs=20)
        assert len(found) >= 20
        for token, logprob in found.items():
            # llama.cpp rounds what flows between layers, too; a wrong order of heads costs several nats.
            assert logprob == pytest.approx(float(expected[token]), abs=0.15)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_llama_cpp_writes_the_greedy_tokens_of_transformers(name, tmp_path):
    model = model_of(name)
    found = LlamaCpp(write(tmp_path / "model.gguf", model)).complete(PROMPTS[1], 8)
    ids = list(PROMPTS[1])
    for step in found:
        expected = likely(model, ids)
        [first, second] = expected.topk(2).values.tolist()
        taken = next(iter(step))
        assert taken == int(expected.argmax()) or first - second < 0.1
        ids.append(taken)


@pytest.mark.parametrize(("quantization", "off"), [("bf16", 0.2), ("q8_0", 0.5), ("q4_0", None)])
def test_llama_cpp_reads_every_quantization(quantization, off, tmp_path):
    model = model_of("llama")
    path = write(tmp_path / "model.gguf", model, quantization)
    [found] = LlamaCpp(path).complete(PROMPTS[1], 1, logprobs=5)
    if off is not None:
        token, logprob = next(iter(found.items()))
        assert logprob == pytest.approx(float(likely(model, PROMPTS[1])[token]), abs=off)


def test_what_is_read_back_is_counted_and_measured_by_type(tmp_path):
    model = model_of("llama")
    path = write(tmp_path / "model.gguf", model, "q4_0")
    written = check_tensors(GGUFReader(path), model, path)
    # The embedding, which is also the output layer, keeps eight bits; norms are never rounded.
    assert written.types == {"F32": 5, "Q4_0": 14, "Q8_0": 1}
    assert written.errors["F32"] == 0
    assert 0 < written.errors["Q8_0"] < 0.01 < written.errors["Q4_0"] < 0.15


def test_rows_that_are_no_whole_block_stay_float16(tmp_path):
    model = small(0)
    path = write(tmp_path / "model.gguf", model, "q8_0")
    assert check_tensors(GGUFReader(path), model, path).types == {"F16": 13, "F32": 5, "Q8_0": 2}


def test_a_file_of_another_model_is_refused(tmp_path):
    path = write(tmp_path / "model.gguf", small(0))
    with pytest.raises(InputError, match=r"token_embd\.weight as F16 has an error of"):
        check_tensors(GGUFReader(path), small(1), path)


def test_weights_beyond_the_range_of_float16_are_found_and_bf16_holds_them(tmp_path):
    model = small(0)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    path = write(tmp_path / "model.gguf", model)
    with pytest.raises(InputError, match=r"(?s)ffn_up.*quantization: bf16"):
        check_tensors(GGUFReader(path), model, path)
    path = write(tmp_path / "wide.gguf", model, "bf16")
    assert check_tensors(GGUFReader(path), model, path).types["BF16"] == 15


def test_equal_models_are_equal_bytes(tmp_path):
    first, second = (write(tmp_path / name, small(0), "q8_0") for name in ("a.gguf", "b.gguf"))
    assert first.read_bytes() == second.read_bytes()


def test_an_architecture_that_is_not_known_is_named_with_the_way_out():
    with pytest.raises(InputError, match=r"(?s)'gpt_neox' has no GGUF export.*export\.gguf: false"):
        find_architecture(small(0, "gpt_neox").config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {**ROTATION, "rope_type": "linear", "factor": 2.0}}, "positions by 'linear'"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
    ],
)
def test_arithmetic_that_gguf_does_not_have_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        find_architecture(small(0, **changes).config)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar is 99, not 16"),
        ("gemma2", {"attn_logit_softcapping": None}, "softcapping is null"),
        ("gemma3-text", {"layer_types": ["full_attention"] * 6}, "not every 6th"),
        ("gemma3-text", {"final_logit_softcapping": 30.0}, "its logits are capped"),
        ("granite", {"attention_bias": True}, "linear layers have biases"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, "not every fourth"),
        ("qwen3-moe", {"norm_topk_prob": False}, "norm_topk_prob is false"),
        ("gpt2", {"activation_function": "relu"}, "activation 'relu'"),
    ],
)
def test_what_an_architecture_of_llama_cpp_takes_for_granted_is_checked(family, changes, message):
    config = build_config(family, 260)
    find_architecture(config)
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(InputError, match=message):
        find_architecture(config)


def test_a_tensor_without_a_name_in_gguf_is_refused():
    model = small(0)
    model.model.layers[0].register_parameter("extra", torch.nn.Parameter(torch.ones(4)))
    with pytest.raises(InputError, match=r"layers\.0\.extra has no name in GGUF's llama"):
        list(list_tensors(model))
