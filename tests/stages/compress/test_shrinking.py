"""Leaving out blocks and channels: what is needed least goes, and every size fits afterwards."""

import pytest
import torch

from services.engines.paged.model import PagedModel, StepInput
from stages.common.errors import InputError
from stages.common.gguf.model import write_gguf
from stages.common.gguf.vocabulary import read_vocabulary
from stages.common.model.blocks import check_shrinkable
from stages.compress.shrinking import drop_blocks, drop_channels, measure_influence
from tests.stages.families import build_config, build_model
from tests.tiny import make_model, make_tokenizer

ROWS = [[2 + (7 * n * n + k) % 94 for n in range(40)] for k in range(4)]
SHAPE = {"num_hidden_layers": 4, "intermediate_size": 96, "initializer_range": 0.3}


def logits(model):
    with torch.inference_mode():
        return model(torch.tensor(ROWS)).logits


def without_effect(model, number):
    """Make a block pass on its input as it is."""
    block = model.model.layers[number]
    with torch.no_grad():
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    return model


@pytest.mark.parametrize("changes", [{}, {"model_type": "qwen3", "tie_word_embeddings": False}], ids=str)
def test_the_block_that_changes_nothing_goes_first(changes):
    model = without_effect(make_model(3, **{**SHAPE, **changes}), 2)
    assert measure_influence(model, model.model.layers, ROWS)[2] == pytest.approx(0, abs=1e-6)
    smaller, kept = drop_blocks(model, ROWS, 0.75)
    assert kept == [0, 1, 3] and smaller.config.num_hidden_layers == 3
    torch.testing.assert_close(logits(smaller), logits(model))


def test_the_blocks_that_are_left_have_numbers_without_gaps_for_the_cache():
    smaller, _ = drop_blocks(without_effect(make_model(3, **SHAPE), 0), ROWS, 0.75)
    assert [block.self_attn.layer_idx for block in smaller.model.layers] == [0, 1, 2]
    prompt = torch.tensor(ROWS[:1])
    written = [
        smaller.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=cache, eos_token_id=999)
        for cache in (True, False)
    ]
    assert torch.equal(*written)


def test_per_block_settings_have_as_many_values_as_there_are_blocks():
    smaller, _ = drop_blocks(make_model(3, model_type="qwen2", **SHAPE), ROWS, 0.5)
    lists = [value for value in smaller.config.to_dict().values() if isinstance(value, list)]
    assert all(len(value) != 4 for value in lists)
    assert smaller.config.layer_types == ["full_attention"] * 2


def test_channels_that_nothing_reads_go_first():
    model = make_model(5, **SHAPE)
    kept = torch.randperm(96, generator=torch.Generator().manual_seed(0))[:64]
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight[:, [n for n in range(96) if n not in kept]] = 0
    smaller, count = drop_channels(model, ROWS, 0.7)
    assert (count, smaller.config.intermediate_size) == (64, 64)
    assert smaller.model.layers[0].mlp.gate_proj.weight.shape == (64, 16)
    torch.testing.assert_close(logits(smaller), logits(model))


def test_tied_embeddings_stay_tied():
    for shrink in (drop_blocks, drop_channels):
        smaller, _ = shrink(make_model(1, **SHAPE), ROWS, 0.5)
        assert smaller.get_output_embeddings().weight is smaller.get_input_embeddings().weight


def test_the_engine_computes_the_smaller_model_from_its_file(tmp_path):
    model, _ = drop_blocks(make_model(2, vocab_size=259, **SHAPE), ROWS, 0.5)
    model, _ = drop_channels(model, ROWS, 0.4)
    path = tmp_path / "model.gguf"
    write_gguf(path, model.half().float(), read_vocabulary(make_tokenizer((("t", "h"),)), 259), "f16", "tiny")
    paged = PagedModel(path, cache_mib=4, threads=1, precision="float32")
    found = torch.tensor(paged.step([StepInput(ROWS[0], 0, [0, 1], len(ROWS[0]))]))
    torch.testing.assert_close(found, logits(model)[0], rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize(
    ("family", "variant", "message"),
    [
        ("gemma3-text", "fewer_layers", r"blocks are not alike \(layer_types\)"),
        ("smollm3", "fewer_layers", r"blocks are not alike"),
        ("phi3", "pruned", "feed-forward layers of the base model are not gate_proj, up_proj, down_proj"),
    ],
)
def test_a_model_that_cannot_be_shrunk_is_refused(family, variant, message):
    model = build_model(build_config(family, 260))
    with pytest.raises(InputError, match=message):
        check_shrinkable(model.config, variant, model)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "granite", "olmo2"])
def test_other_families_can_be_shrunk(family):
    model = build_model(build_config(family, 260))
    for variant, shrink in (("fewer_layers", drop_blocks), ("pruned", drop_channels)):
        check_shrinkable(model.config, variant, model)
        assert torch.isfinite(logits(shrink(model, ROWS, 0.5)[0])).all()
