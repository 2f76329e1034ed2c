"""Virtual tokens are read once, before the text, however a model is called."""

import json

import pytest
import torch

from stages.common.chat.template import Encoded
from stages.common.errors import InputError
from stages.common.model.generation import EvalPrompt, answer_questions
from stages.common.model.loading import load_tokenizer, load_tuned, read_config
from stages.common.model.virtual_tokens import begin_cache, check_init_text, count_values
from stages.common.params.loading import load_params
from stages.finetune.adapter import build_model, save_adapter
from stages.finetune.progress.flops import count_work
from stages.finetune.progress.memory import MemoryPlan
from stages.finetune.shared_prefix import lay_out
from stages.finetune.speedups import speed_up_training
from stages.preflight.finetune_checks import count_training
from tests.stages.families import ROOT, make_base
from tests.stages.finetune.project import make_recipe
from tests.tiny import save_model

METHODS = ("prompt_tuning", "prefix_tuning")
CPU = torch.device("cpu")
# The same 6 tokens first; lengths differ, so that padding is part of every batch.
EXAMPLES = [Encoded([0, 5, 6, 7, 8, 9, *range(20 + n, 30 + 2 * n), 1], 9 + n % 2) for n in (1, 4, 2)]


def make_recipe_of(method, **changes):
    return make_recipe(method=method, num_virtual_tokens=5, **changes)


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


def read_gradients(model, share_prefix):
    """The loss of the examples, and the gradients of what is learned, with or without one sequence."""
    model.zero_grad()
    batch = lay_out(EXAMPLES, 1, share_prefix)
    loss = torch.nn.functional.cross_entropy(batch.answer_logits(model), batch.targets)
    loss.backward()
    return [float(loss), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3-text", "gemma2", "gpt-neox", "gpt2"])
def test_one_sequence_has_the_loss_and_gradients_of_pefts_own_padded_rows(tmp_path, family, method):
    make_base(tmp_path, family)
    if family == "gpt-neox":  # whose configurations have no such keys but in these tests
        config = json.loads((tmp_path / "config.json").read_text())
        lacking = {name: config[name] for name in config if name not in ("num_key_value_heads", "head_dim")}
        (tmp_path / "config.json").write_text(json.dumps(lacking))
    model = build_model(tmp_path, make_recipe_of(method))
    plain = read_gradients(model, share_prefix=False)
    shares, _ = speed_up_training(model, EXAMPLES, 1)
    assert shares == (family != "gpt2")
    fast = read_gradients(model, shares)
    assert len(fast) == 2
    assert fast[0] == pytest.approx(plain[0], rel=1e-5)
    assert torch.allclose(fast[1], plain[1], rtol=1e-3, atol=1e-5)


def test_answers_are_those_of_pefts_own_generation_also_in_a_padded_batch(tmp_path, method):
    base = save_model(tmp_path / "base", initializer_range=0.4)
    recipe = make_recipe_of(method)
    save_adapter(build_model(base, recipe), recipe, tmp_path / "adapter", [])
    model = load_tuned(base, tmp_path / "adapter", torch.float32, CPU)
    prompts = [[4, 5, 6, 7], [9, 8], [30, 31, 32, 33, 34, 35, 36]]
    questions = [EvalPrompt(prompt, [40, 41, 1]) for prompt in prompts]
    tokenizer = load_tokenizer(base)
    answers = answer_questions(model, tokenizer, questions, 3, 6)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        written = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )[0]
        assert answer.text == tokenizer.decode(_behind(written, prompt))
        whole = torch.tensor([[*prompt, 40, 41, 1]])
        losses = torch.log_softmax(model(whole).logits[0, len(prompt) - 1 : -1], dim=-1)
        expected = -losses.gather(1, whole[0, len(prompt) :, None]).sum()
        assert answer.reference_loss == pytest.approx(float(expected), rel=1e-4)


def _behind(written, prompt):
    """The tokens of an answer without its end; some versions of transformers return the prompt, too."""
    tokens = written.tolist()
    tokens = tokens[len(prompt) :] if tokens[: len(prompt)] == prompt else tokens
    return tokens[: tokens.index(1)] if 1 in tokens else tokens


def test_rows_padded_on_the_left_with_their_positions_are_read_as_alone(tmp_path, method):
    model = build_model(save_model(tmp_path, initializer_range=0.4), make_recipe_of(method)).eval()
    short, long = [4, 5, 6], [9, 8, 7, 6, 5, 4]
    ids = torch.tensor([[1] * 3 + short, long])
    mask = torch.tensor([[0] * 3 + [1] * 3, [1] * 6])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        both = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        kept = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=torch.tensor([5])
        ).logits
        alone = [model(input_ids=torch.tensor([row])).logits[0] for row in (short, long)]
    assert both.shape[1] == 6 and torch.allclose(kept[:, 0], both[:, -1], atol=1e-5)
    assert torch.allclose(both[0, 3:], alone[0], atol=1e-5) and torch.allclose(both[1], alone[1], atol=1e-5)


def test_a_model_without_virtual_tokens_begins_with_no_cache(tmp_path):
    assert begin_cache(build_model(save_model(tmp_path), make_recipe()), 2) is None


def test_operations_and_memory_are_those_of_the_whole_model_and_of_little_that_is_trained(tmp_path, method):
    model = build_model(save_model(tmp_path), make_recipe_of(method))
    layers = 2 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32)
    assert count_work(model).each_token == 4 * layers
    shares, _ = speed_up_training(model, EXAMPLES, 1)
    estimate = MemoryPlan(model, EXAMPLES, 1, shares).estimate(3, 100)
    trained = 5 * count_values(model.config, method)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    assert estimate.optimizer == trained * (4 + 8) and estimate.activations > 0


def test_the_text_to_begin_with_is_its_words_and_may_not_be_cut(tmp_path):
    base = save_model(tmp_path)
    text = {"prompt_tuning_init": "text", "prompt_tuning_init_text": "abc"}
    model = build_model(base, make_recipe_of("prompt_tuning", **text))
    ids = load_tokenizer(base)("abcab")["input_ids"]
    words = model.get_base_model().get_input_embeddings()(torch.tensor(ids))
    assert torch.equal(model.get_prompt(1)[0], words)
    with pytest.raises(InputError, match=r"has 7 tokens, and finetune\.num_virtual_tokens is 5") as error:
        check_init_text(load_tokenizer(base), "abcdefg", 5)
    assert "num_virtual_tokens: 7" in error.value.fix


def test_other_first_values_are_words_at_random_or_zeros(tmp_path):
    base = save_model(tmp_path)
    model = build_model(base, make_recipe_of("prompt_tuning", prompt_tuning_init="sample_vocab"))
    words = model.get_base_model().get_input_embeddings().weight
    assert all((words == token).all(dim=1).any() for token in model.get_prompt(1)[0])
    zeros = build_model(base, make_recipe_of("prefix_tuning", prefix_tuning_init="zero"))
    assert not any(p.any() for p in zeros.parameters() if p.requires_grad)


def test_virtual_tokens_of_another_base_model_are_refused(tmp_path, method):
    base, other = save_model(tmp_path / "base"), save_model(tmp_path / "other", hidden_size=32)
    recipe = make_recipe_of(method)
    save_adapter(build_model(base, recipe), recipe, tmp_path / "adapter", [])
    with pytest.raises(InputError, match="does not fit the base model: its virtual tokens are") as error:
        load_tuned(other, tmp_path / "adapter", torch.float32, CPU)
    assert "fetch the base model" in error.value.fix


def test_keys_of_another_shape_than_the_configuration_says_are_refused(tmp_path):
    make_base(tmp_path, "gpt-neox")  # has num_key_value_heads in its configuration, and as many as heads
    with pytest.raises(InputError, match="are not as its configuration says") as error:
        build_model(tmp_path, make_recipe_of("prefix_tuning"))
    assert "finetune.method: prompt_tuning" in error.value.fix
    config = read_config(tmp_path)
    finetune = load_params(ROOT / "params.yaml").finetune
    with pytest.raises(InputError, match="are not as its configuration says"):
        count_training(config, finetune.model_copy(update={"method": "prefix_tuning"}))


def test_more_virtual_tokens_than_positions_are_refused(tmp_path, method):
    base = save_model(tmp_path, max_position_embeddings=5)
    with pytest.raises(InputError, match="is 5, and the base model has 5 positions"):
        build_model(base, make_recipe_of(method))
