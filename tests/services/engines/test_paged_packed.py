"""The paged engine computes with quantized weights as they are in the file."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from services.engines.paged.model import PagedModel, StepInput
from services.engines.paged.packed import Packed, concatenate, pack_q4_0, pack_q8_0
from services.engines.paged.weights import read_weights
from stages.common.gguf.model import write_gguf
from stages.common.gguf.vocabulary import read_vocabulary
from tests.tiny import make_model, make_tokenizer

PROMPT = [2 + (7 * n * n + 3) % 94 for n in range(70)]
KINDS = {"q8_0": pack_q8_0, "q4_0": pack_q4_0}


def draw(rows, columns, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


@pytest.mark.parametrize("name", KINDS)
def test_a_packed_matrix_has_the_numbers_of_its_file(name):
    kind = GGMLQuantizationType[name.upper()]
    raw = quantize(draw(6, 96), kind)
    packed = KINDS[name](raw)
    assert (len(packed), packed.columns) == (6, 96)
    np.testing.assert_array_equal(packed.unpack(), dequantize(raw, kind))


def test_matrices_of_two_types_are_joined_as_numbers():
    eight = pack_q8_0(quantize(draw(4, 64), GGMLQuantizationType.Q8_0))
    four = pack_q4_0(quantize(draw(2, 64, 1), GGMLQuantizationType.Q4_0))
    alike, mixed = concatenate([eight, eight]), concatenate([eight, four])
    assert isinstance(alike, Packed) and isinstance(mixed, np.ndarray)
    np.testing.assert_array_equal(alike.unpack(), np.tile(eight.unpack(), (2, 1)))
    np.testing.assert_array_equal(mixed, np.concatenate([eight.unpack(), four.unpack()]))


@pytest.mark.parametrize("changes", [{}, {"model_type": "qwen3", "tie_word_embeddings": False}], ids=str)
@pytest.mark.parametrize("quantization", ["q8_0", "q4_0"])
def test_answers_are_those_of_the_unpacked_numbers(quantization, changes, tmp_path):
    shape = {
        "vocab_size": 259,
        "hidden_size": 64,
        "intermediate_size": 96,
        "head_dim": 16,
        "initializer_range": 0.2,
    }
    model = make_model(2, **{**shape, **changes})
    path = tmp_path / "model.gguf"
    write_gguf(path, model, read_vocabulary(make_tokenizer((("t", "h"),)), 259), quantization, "tiny")
    put_unpacked(model, read_weights(path).tensors)
    paged = PagedModel(path, cache_mib=4, threads=1, precision="float32")
    steps = (StepInput(PROMPT[:45], 0, [0, 1], 45), StepInput(PROMPT[45:], 45, [0, 1, 2], len(PROMPT) - 45))
    found = torch.cat([torch.tensor(paged.step([step])) for step in steps])
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0]
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=5e-3)


def put_unpacked(model, tensors):
    """Give a model the numbers that its file holds; the order of heads is that of transformers already."""
    from stages.common.gguf.model import name_parts

    packed = 0
    with torch.no_grad():
        for key, weights in model.named_parameters():
            [(name, _)] = name_parts(model.config, key)
            if isinstance(tensors[name], Packed):
                weights.copy_(torch.from_numpy(tensors[name].unpack()))
                packed += 1
    assert packed >= 15
