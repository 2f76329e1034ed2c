"""The graph of the paged engine computes each architecture that it says it does."""

import pytest
import torch

from services.engines.paged.model import PagedModel, StepInput
from services.engines.paged.weights import read_weights
from services.engines.protocol import EngineError
from services.engines.support import check_openvino, check_paged
from stages.common.gguf.model import write_gguf
from stages.common.gguf.vocabulary import read_vocabulary
from tests.stages.families import KNOWN, build_config, build_model, round_weights
from tests.tiny import make_model, make_tokenizer

SIZE = 259
PROMPT = [2 + (7 * n * n + 3) % 94 for n in range(70)]
MERGES = (("t", "h"),)  # no GGUF without one


def write(folder, model, kind):
    if kind == "safetensors":
        model.save_pretrained(folder)
        return folder
    path = folder / "model.gguf"
    write_gguf(path, model, read_vocabulary(make_tokenizer(MERGES), SIZE), "f16", "tiny")
    return path


def compute(path):
    """Return the log-probabilities behind each token of the prompt, read in two steps."""
    model = PagedModel(path, cache_mib=4, threads=1, precision="float32")
    steps = (StepInput(PROMPT[:45], 0, [0, 1], 45), StepInput(PROMPT[45:], 45, [0, 1, 2], len(PROMPT) - 45))
    logits = [torch.tensor(model.step([step])) for step in steps]
    return torch.cat(logits).log_softmax(-1)


def expect(model):
    with torch.inference_mode():
        return model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
@pytest.mark.parametrize("family", [name for name, known in KNOWN.items() if known.paged])
def test_the_graph_computes_what_transformers_computes(family, kind, tmp_path):
    model = round_weights(build_model(build_config(family, SIZE)))
    found, expected = compute(write(tmp_path, model, kind)), expect(model)
    assert expected.std() > 0.5  # not all alike
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_biases_of_a_llama_are_computed_too(kind, tmp_path):
    config = build_config("llama", SIZE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    model = round_weights(build_model(config))
    torch.testing.assert_close(compute(write(tmp_path, model, kind)), expect(model), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("family", [name for name, known in KNOWN.items() if not known.paged])
def test_a_family_that_the_graph_does_not_compute_is_refused(family, tmp_path):
    config = build_config(family, SIZE)
    assert "and this model is of" in check_paged(config.to_dict())
    build_model(config).save_pretrained(tmp_path)
    with pytest.raises(EngineError, match=config.model_type):
        read_weights(tmp_path)


@pytest.mark.parametrize("family", KNOWN)
def test_openvino_gets_only_what_its_reader_computes(family):
    assert (check_openvino(build_config(family, SIZE).to_dict()) is None) == KNOWN[family].openvino


def test_openvino_gets_no_llama_whose_biases_it_mixes_up():
    config = build_config("llama", SIZE, attention_bias=True).to_dict()
    assert "biases" in check_openvino(config)


def test_scaled_positions_that_the_graph_does_not_compute_are_refused():
    config = make_model().config.to_dict()
    assert check_paged(config) is None
    for key in ("rope_parameters", "rope_scaling"):
        yarn = {**config, "rope_parameters": None, key: {"rope_type": "yarn", "factor": 4.0}}
        assert "'yarn'" in check_paged(yarn)
