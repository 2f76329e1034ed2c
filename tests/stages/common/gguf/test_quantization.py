"""Numbers of 4 bits: the layouts are read by the package gguf and by llama.cpp itself."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize

from stages.common.gguf.model import check_tensors, find_uneven_tensor, write_gguf
from stages.common.gguf.quantization import find_scales, quantize_values, round_to_scales
from stages.common.gguf.vocabulary import read_vocabulary
from stages.common.model.loading import make_empty
from tests.llama_cpp import LlamaCpp
from tests.tiny import make_model, make_tokenizer

Q4_0, Q4_K = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_K


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def read_back(values, kind):
    return dequantize(quantize_values(values, kind), kind)


def error(values, found):
    return np.linalg.norm(values - found) / np.linalg.norm(values)


def test_q4_0_has_the_layout_of_gguf_and_loses_less_than_its_own_rounding():
    values = draw(16, 128)
    own, plain = read_back(values, Q4_0), dequantize(quantize(values, Q4_0), Q4_0)
    assert own.shape == values.shape
    assert 0.05 < error(values, own) < error(values, plain)


def test_q4_k_has_the_layout_of_gguf_and_loses_less_than_q4_0():
    values = draw(16, 512)
    assert 0.03 < error(values, read_back(values, Q4_K)) < error(values, read_back(values, Q4_0))


def test_q4_k_keeps_groups_of_one_sign_of_zeros_and_of_very_different_sizes():
    values = np.abs(draw(8, 256)) + 1
    values[1] *= -1
    values[2] = 0
    values[3, :32] *= 100
    found = read_back(values, Q4_K)
    assert np.isfinite(found).all() and not found[2].any()
    assert all(error(values[row], found[row]) < 0.05 for row in (0, 1, 3))


def test_numbers_that_were_rounded_are_rounded_to_themselves():
    scales = find_scales(draw(64, 32))
    rounded = round_to_scales(draw(64, 32), scales) * scales
    rounded[:5] = 0
    assert np.array_equal(read_back(rounded, Q4_0), rounded)


def test_a_quantization_whose_blocks_do_not_divide_the_rows_is_found():
    config = make_model(hidden_size=64, intermediate_size=256).config
    assert find_uneven_tensor(config, "q8_0") is None and find_uneven_tensor(config, "q4_0") is None
    assert find_uneven_tensor(config, "q4_k") == "blk.0.attn_q.weight with 64 columns"
    assert find_uneven_tensor(config, "f16") is None
    assert make_empty(config).device.type == "meta"


@pytest.mark.parametrize("quantization", ["q8_0", "q4_0", "q4_k"])
def test_llama_cpp_answers_from_the_file_as_from_its_numbers(quantization, tmp_path):
    """What llama.cpp computes is what transformers computes with the numbers read back from the file."""
    import torch

    model = make_model(
        1,
        vocab_size=260,
        hidden_size=256,
        intermediate_size=256,
        initializer_range=0.1,
        num_attention_heads=4,
    )
    with (
        torch.no_grad()
    ):  # never the likeliest: marks and bytes beyond ASCII, of which it tells no probability
        model.get_input_embeddings().weight[[0, 1, *range(96, 260)]] = 0
    vocabulary = read_vocabulary(make_tokenizer((("t", "h"),)), 260)
    path = tmp_path / "model.gguf"
    write_gguf(path, model, vocabulary, quantization, "tiny")
    report = check_tensors(GGUFReader(path), model, path)
    assert report.types[quantization.upper()] >= 14
    put_back(model, GGUFReader(path))
    prompt = [0, 40, 41, 42]
    [first] = LlamaCpp(path).complete(prompt, 1, logprobs=5)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    assert len(first) >= 5
    # llama.cpp rounds activations to 8 bits where they meet quantized weights; a wrong layout costs nats.
    for token, logprob in first.items():
        assert logprob == pytest.approx(float(expected[token]), abs=0.2)


def put_back(model, reader):
    """Give a Llama the numbers of its file."""
    import torch

    from stages.common.gguf.model import name_parts

    found = {tensor.name: tensor for tensor in reader.tensors}
    with torch.no_grad():
        for key, weights in model.named_parameters():
            [(name, _)] = name_parts(model.config, key)
            values = torch.from_numpy(dequantize(found[name].data, found[name].tensor_type).copy())
            if key.endswith(("q_proj.weight", "k_proj.weight")):
                heads = (
                    model.config.num_attention_heads if "q_proj" in key else model.config.num_key_value_heads
                )
                values = values.reshape(heads, -1, 2, values.shape[-1]).transpose(1, 2)
            weights.copy_(values.reshape(weights.shape))
