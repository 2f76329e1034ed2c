import pytest
import torch

from stages.common.chat.template import end_of_turn_ids
from stages.common.errors import InputError
from stages.common.messages import Message
from stages.common.model.generation import answer_questions, check_fit, encode_questions, measure_latencies
from stages.common.records import make_row
from tests.tiny import make_model, make_tokenizer

SENTENCES = ["lamp on", "turn the kitchen lamp on please", "a", "stop my 8 hours timer", "off", "what is it"]
REPLIES = [
    '{"a":1}',
    "ok",
    '{"intent":"HassTurnOn","area":"kitchen"}',
    "y",
    "a longer answer than the others",
    "no",
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def questions(tokenizer):
    rows = [
        make_row([Message("user", s), Message("assistant", r)], "toy", "mit")
        for s, r in zip(SENTENCES, REPLIES, strict=True)
    ]
    return encode_questions(tokenizer, rows)


@pytest.fixture(scope="module")
def model():
    """A random toy that writes eleven letters or ends: its answers differ, and some ramble."""
    torch.set_num_threads(1)
    model = make_model(seed=3)
    with torch.no_grad():
        for weights in model.model.parameters():
            weights.mul_(20.0 if weights.dim() == 2 else 1.0)
        head = torch.zeros(258, 16)
        head[[1, *range(66, 77)]] = torch.randn(12, 16)
        model.lm_head.weight = torch.nn.Parameter(head)
    return model


def alone(model, tokenizer, question, limit):
    """What transformers' own generate answers to one question without padding."""
    ids = torch.tensor([question.prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=limit,
        do_sample=False,
        eos_token_id=end_of_turn_ids(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    return out[0, len(question.prompt) :].tolist()


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_answers_are_those_of_generate_whatever_shares_their_batch(model, tokenizer, questions, batch_size):
    answers = answer_questions(model, tokenizer, questions, batch_size, max_new_tokens=24)
    for answer, question in zip(answers, questions, strict=True):
        expected = alone(model, tokenizer, question, 24)
        complete = expected[-1] in end_of_turn_ids(tokenizer)
        assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)
        assert answer.complete == complete
        assert answer.tokens == len(expected) - complete


def test_the_toy_model_ends_some_answers_and_not_others(model, tokenizer, questions):
    """Else the test above would not see rows leave their batch."""
    answers = answer_questions(model, tokenizer, questions, 6, max_new_tokens=24)
    assert len({answer.text for answer in answers}) > 3
    assert {answer.complete for answer in answers} == {True, False}


@pytest.mark.parametrize(("batch_size", "at_once"), [(1, 512), (6, 512), (6, 12), (4, 1)])
def test_reference_losses_are_those_of_each_conversation_read_alone(
    model, tokenizer, questions, batch_size, at_once, monkeypatch
):
    monkeypatch.setattr("stages.common.model.generation.LOSS_TOKENS_AT_ONCE", at_once)
    answers = answer_questions(model, tokenizer, questions, batch_size, max_new_tokens=1)
    for answer, question in zip(answers, questions, strict=True):
        ids = torch.tensor([question.prompt + question.reference])
        with torch.inference_mode():
            logits = model(ids).logits[0, len(question.prompt) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(
            logits, torch.tensor(question.reference), reduction="sum"
        )
        assert answer.reference_loss == pytest.approx(float(expected), rel=1e-4)


def test_an_answer_is_cut_at_the_limit(model, tokenizer, questions):
    for answer in answer_questions(model, tokenizer, questions, 6, max_new_tokens=3):
        assert answer.tokens <= 3


def test_progress_counts_questions(model, tokenizer, questions):
    seen = []
    answer_questions(model, tokenizer, questions, 4, max_new_tokens=2, on_progress=seen.append)
    assert seen == [4, 6]


def test_single_questions_are_timed(model, tokenizer, questions):
    seconds = measure_latencies(lambda q: answer_questions(model, tokenizer, [q], 1, 2), questions[:2])
    assert len(seconds) == 2
    assert all(s > 0 for s in seconds)


def test_a_question_beyond_the_context_is_refused_with_the_numbers(questions):
    with pytest.raises(InputError, match=r"takes \d+ tokens .* reads 32"):
        check_fit(questions, 24, context_tokens=32)
