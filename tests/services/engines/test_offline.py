import pytest

from services.engines.paged import offline
from services.engines.paged.model import PagedModel
from services.engines.paged.offline import answer_offline
from stages.common.chat.template import end_of_turn_ids
from stages.common.model.generation import EvalPrompt, answer_questions
from tests.services.engines.makers import tiny

LIMIT = 24
SYSTEM = "answer in one word. " * 3  # a common beginning of more than a block
PROMPTS = ("hello", "what is this?", "a", "x" * 70, "the table", "the chair", "and so on")


def ids_of(text):
    return tiny().tokenizer(text).input_ids


@pytest.fixture(scope="module")
def model():
    return PagedModel(tiny().folder / "model.gguf", cache_mib=4, threads=1, precision="float32")


@pytest.fixture(scope="module")
def questions():
    """Prompts whose references are the model's own answer, its beginning, something else, or long."""
    (end,) = end_of_turn_ids(tiny().tokenizer)
    prompts = [ids_of(SYSTEM + text) for text in PROMPTS]
    plain = answer_questions(
        tiny().model, tiny().tokenizer, [EvalPrompt(p, [end]) for p in prompts], 8, LIMIT
    )
    own = [ids_of(answer.text) for answer in plain]
    references = [
        [*own[0], end],
        [*own[1][:3], end],
        [end],
        [*ids_of("something else"), end],
        [*own[4][:5], *ids_of(" quite different"), end],
        [*ids_of("y" * 90), end],
        [*own[6], end],
    ]
    return [EvalPrompt(prompt, reference) for prompt, reference in zip(prompts, references, strict=True)]


@pytest.mark.parametrize(("step_tokens", "running"), [(512, 128), (7, 128), (40, 2), (512, 1)])
def test_answers_and_losses_are_those_of_transformers(model, questions, step_tokens, running, monkeypatch):
    monkeypatch.setattr(offline, "STEP_TOKENS", step_tokens)
    wanted = answer_questions(tiny().model, tiny().tokenizer, questions, 8, LIMIT)
    done = []
    found = answer_offline(
        model,
        [q.prompt for q in questions],
        [q.reference for q in questions],
        end_of_turn_ids(tiny().tokenizer),
        LIMIT,
        done.append,
        running=running,
    )
    assert [(len(c.token_ids), c.ended) for c in found] == [(a.tokens, a.complete) for a in wanted]
    texts = [tiny().tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in found]
    assert texts == [a.text for a in wanted]
    assert [c.reference_nll for c in found] == pytest.approx([a.reference_loss for a in wanted], rel=1e-3)
    assert done[-1] == len(questions)
    assert done == sorted(done)


def test_without_references_the_answers_are_the_same(model, questions):
    prompts, ends = [q.prompt for q in questions], end_of_turn_ids(tiny().tokenizer)
    scored = answer_offline(model, prompts, [q.reference for q in questions], ends, LIMIT)
    plain = answer_offline(model, prompts, None, ends, LIMIT)
    assert [c.token_ids for c in plain] == [c.token_ids for c in scored]
    assert {c.reference_nll for c in plain} == {0.0}


def test_more_prompts_than_the_cache_holds_are_answered_in_turn(questions):
    small = PagedModel(tiny().folder / "model.gguf", cache_mib=1, threads=1, precision="float32")
    small.blocks = 12  # each sequence takes four to six
    prompts, ends = [q.prompt for q in questions] * 3, end_of_turn_ids(tiny().tokenizer)
    found = answer_offline(small, prompts, [q.reference for q in questions] * 3, ends, LIMIT)
    assert found[:7] == found[7:14] == found[14:]


def test_a_checkpoint_of_transformers_gives_the_answers_of_its_gguf(model, questions):
    folder = PagedModel(tiny().folder, cache_mib=4, threads=1, precision="float32")
    prompts, ends = [q.prompt for q in questions], end_of_turn_ids(tiny().tokenizer)
    references = [q.reference for q in questions]
    assert answer_offline(folder, prompts, references, ends, LIMIT) == answer_offline(
        model, prompts, references, ends, LIMIT
    )


def test_no_prompt_has_no_answer(model):
    assert answer_offline(model, [], [], [1], LIMIT) == []
