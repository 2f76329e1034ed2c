"""A model with a head over labels answers with them, in all the ways of any other model."""

import asyncio
import json
import math

import pytest
import torch

from services.engines.protocol import Sampling, SchemaUnsupported, Unsupported
from services.engines.transformers import LabelEngine
from stages.common.artifacts import write_json
from stages.common.model.generation import EvalPrompt, answer_questions
from stages.common.model.label_head import find_labels, put_head
from stages.common.model.loading import load_base, load_tokenizer, load_tuned
from stages.common.model.replaced import list_trained, write_weights
from tests.tiny import save_model

# "no" begins with the tokens of "n", and both "yes" have the likelier first token together.
LABELS = ("n", "no", "yes a", "yes b")
BIASES = (0.0, 1.0, 0.8, 0.9)
PROMPT = [4, 5, 6, 7]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("labels")
    base, adapter = save_model(root / "base", initializer_range=0.4), root / "adapter"
    model = load_base(base, torch.float32, CPU)
    model.requires_grad_(False)
    head = put_head(model, LABELS).requires_grad_(True)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0)) * 0.01)
        head.bias.copy_(torch.tensor(BIASES))
    adapter.mkdir()
    write_weights(list_trained(model), adapter / "replaced_weights.safetensors")
    write_json(adapter / "replaced_config.json", {"method": "head", "labels": list(LABELS)})
    return base, adapter


@pytest.fixture(scope="module")
def engine(folders):
    base, adapter = folders
    made = LabelEngine(base, adapter, load_tokenizer(base), device="cpu", precision="float32")
    yield made
    made.close()


def ask(engine, tokenizer, prompt=PROMPT, **sampling):
    """Return the text, the log-probabilities of its tokens with that of the end, and the last step."""

    async def read():
        return [step async for step in engine.generate(prompt, Sampling(16, **sampling))]

    steps = asyncio.run(read())
    tokens = [token for step in steps for token in step.token_ids]
    logprobs = [one for step in steps for one in (*step.logprobs, *([step.end] if step.end else []))]
    return tokenizer.decode(tokens), logprobs, steps[-1]


@pytest.fixture(scope="module")
def tokenizer(folders):
    return load_tokenizer(folders[0])


@pytest.fixture(scope="module")
def shares(folders):
    model = load_tuned(*folders, torch.float32, CPU)
    assert find_labels(model) == LABELS
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits[0, -1].softmax(-1).tolist()


def test_the_likeliest_label_is_the_answer_where_others_together_begin_likelier(engine, tokenizer, shares):
    assert max(shares) == shares[1] < shares[2] + shares[3]
    text, _, last = ask(engine, tokenizer)
    assert (text, last.finish_reason) == ("no", "stop")


@pytest.mark.parametrize("label", LABELS)
def test_the_probabilities_of_its_tokens_multiply_to_that_of_a_label(engine, tokenizer, shares, label):
    text, logprobs, _ = ask(engine, tokenizer, logprobs=2, choices=(label,))
    assert text == label
    total = math.exp(sum(one.logprob for one in logprobs))
    assert total == pytest.approx(shares[LABELS.index(label)], rel=1e-4)


def test_labels_are_drawn_with_their_probabilities_and_a_seed_repeats_one(engine, tokenizer, shares):
    drawn = [ask(engine, tokenizer, temperature=1.0, seed=seed)[0] for seed in range(200)]
    assert drawn[:5] == [ask(engine, tokenizer, temperature=1.0, seed=seed)[0] for seed in range(5)]
    for label, share in zip(LABELS, shares, strict=True):
        assert abs(drawn.count(label) / 200 - share) < 4 * math.sqrt(share * (1 - share) / 200)


def test_answers_of_a_batch_and_of_requests_at_once_are_those_of_each_alone(folders, engine, tokenizer):
    prompts = [[3 + n, *range(40, 40 + 3 * n)] for n in range(1, 6)]
    alone = [ask(engine, tokenizer, prompt)[0] for prompt in prompts]

    async def ask_all():
        async def one(prompt):
            return [t async for step in engine.generate(prompt, Sampling(16)) for t in step.token_ids]

        return await asyncio.gather(*map(one, prompts))

    assert [tokenizer.decode(tokens) for tokens in asyncio.run(ask_all())] == alone
    model = load_tuned(*folders, torch.float32, CPU)
    questions = [EvalPrompt(prompt, [*tokenizer("yes b")["input_ids"], 1]) for prompt in prompts]
    answers = answer_questions(model, tokenizer, questions, 5, 16)
    assert [answer.text for answer in answers] == alone and all(answer.complete for answer in answers)
    with torch.no_grad():
        for prompt, answer in zip(prompts, answers, strict=True):
            expected = -model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)[3]
            assert answer.reference_loss == pytest.approx(float(expected), rel=1e-4)


def test_a_schema_of_labels_holds_the_answer_and_one_without_them_is_refused(engine, tokenizer):
    assert ask(engine, tokenizer, choices=("n", "yes a"))[0] == "yes a"
    with pytest.raises(SchemaUnsupported, match="none of the labels"):
        ask(engine, tokenizer, json_schema=json.dumps({"type": "object"}))
    with pytest.raises(Unsupported, match="no log-probabilities of a prompt"):
        ask(engine, tokenizer, logprobs=0, prompt_logprobs=True)


def test_an_answer_is_cut_at_its_limit_and_a_vector_of_the_prompt_is_the_base_models(engine, tokenizer):
    async def read(limit, **more):
        return [step async for step in engine.generate(PROMPT, Sampling(limit, **more))]

    assert asyncio.run(read(1))[-1].finish_reason == "length"
    assert len(asyncio.run(read(1, embeds_prompt=True))[0].embedding) == 16
