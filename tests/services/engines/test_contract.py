"""What every engine promises, asked of each that runs here with the same tiny model."""

import asyncio
import contextlib
import json
import math
import threading
from functools import cache

import jsonschema
import pytest

from services.engines.protocol import (
    ContextOverflow,
    EngineError,
    Load,
    QueueFull,
    Sampling,
    SchemaUnsupported,
    Unsupported,
)
from tests.services.engines.makers import MAKERS, tiny

LONG = 400
# A drawn answer to this schema has no end before the cut.
ENDLESS = '{"type": "array", "items": {"type": "boolean"}, "minItems": 1000}'


@pytest.fixture(scope="module", params=sorted(MAKERS))
def maker(request):
    return MAKERS[request.param]


@pytest.fixture(scope="module")
def engine(maker):
    made = maker(max_running=4, max_waiting=64)
    yield made
    made.close()


@pytest.fixture
def make(maker):
    made = []

    def build(**settings):
        made.append(maker(**settings))
        return made[-1]

    yield build
    for one in made:
        one.close()


def ids_of(text):
    return tiny().tokenizer(text, add_special_tokens=False)["input_ids"]


async def answer(engine, prompt, sampling):
    """Return an answer's tokens, its finish reason and its log-probabilities."""
    ids, logprobs, reason = [], [], None
    async for step in engine.generate(prompt, sampling):
        assert reason is None, "a step came behind the last"
        ids += step.token_ids
        logprobs += step.logprobs
        reason = step.finish_reason
    return ids, reason, logprobs


def expected(prompt, count):
    """Return what transformers' own `generate` writes."""
    ids, reason = generate(tuple(prompt), count)
    return [*ids], reason


@cache
def generate(prompt, count):
    import torch

    model = tiny().model
    out = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    ids = out[0, len(prompt) :].tolist()
    return (ids[:-1], "stop") if ids[-1] == model.config.eos_token_id else (ids, "length")


async def until_idle(engine):
    while engine.load() != Load(0, 0):
        await asyncio.sleep(0.001)


def test_greedy_answers_are_those_of_generate_also_side_by_side(engine):
    prompts = [ids_of(text) for text in ("hello", "what is this?", "a", "x" * 70, "the table", "1 2 3")]

    async def ask():
        return await asyncio.gather(*(answer(engine, prompt, Sampling(24)) for prompt in prompts))

    for prompt, (ids, reason, _) in zip(prompts, asyncio.run(ask()), strict=True):
        assert (ids, reason) == expected(prompt, 24)


def test_a_prompt_read_in_pieces_gets_the_same_answer(make):
    engine = make(batch_tokens=16)
    prompt = ids_of("a long prompt, longer than what is read at once; " * 4)
    ids, reason, _ = asyncio.run(answer(engine, prompt, Sampling(12)))
    assert (ids, reason) == expected(prompt, 12)


def test_a_short_answer_does_not_wait_for_a_long_one(engine):
    ended = []

    async def ask(name, sampling):
        await answer(engine, ids_of(name), sampling)
        ended.append(name)

    async def both():
        long = asyncio.create_task(ask("long", Sampling(LONG, temperature=1.0, seed=1, json_schema=ENDLESS)))
        while engine.load().running == 0:
            await asyncio.sleep(0.001)
        await ask("short", Sampling(4))
        await long

    asyncio.run(both())
    assert ended == ["short", "long"]


def test_closing_the_generator_frees_its_place(engine):
    async def leave():
        steps = [engine.generate(ids_of(str(n)), Sampling(LONG, temperature=1.0)) for n in range(4)]
        for one in steps:
            await anext(one)
        for one in steps:
            await one.aclose()
        await until_idle(engine)
        return await answer(engine, ids_of("hello"), Sampling(8))

    assert asyncio.run(leave())[:2] == expected(ids_of("hello"), 8)


def test_a_cancelled_caller_frees_its_place_also_while_it_waits(engine):
    async def leave():
        tasks = [
            asyncio.create_task(answer(engine, ids_of(str(n)), Sampling(LONG, temperature=1.0)))
            for n in range(8)
        ]
        await asyncio.sleep(0.005)  # some run by now, and others wait
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until_idle(engine)

    asyncio.run(leave())


def test_equal_seeds_draw_equal_answers_and_others_others(engine):
    async def draw(seed):
        ids, _, _ = await answer(engine, ids_of("hello"), Sampling(24, temperature=1.5, seed=seed))
        return ids

    first, again, other = (asyncio.run(draw(seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_small_top_p_draws_the_likeliest_token(engine):
    sampling = Sampling(16, temperature=1.0, top_p=1e-6, seed=3)
    ids, reason, _ = asyncio.run(answer(engine, ids_of("hello"), sampling))
    assert (ids, reason) == expected(ids_of("hello"), 16)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_logprobs_are_the_models_own(engine, temperature):
    import torch

    prompt = ids_of("hello")
    sampling = Sampling(16, temperature=temperature, seed=4, logprobs=3)
    ids, _, logprobs = asyncio.run(answer(engine, prompt, sampling))
    with torch.inference_mode():
        nats = tiny().model(torch.tensor([prompt + ids])).logits[0].log_softmax(dim=-1)
    assert [one.token_id for one in logprobs] == ids
    for place, one in enumerate(logprobs, len(prompt) - 1):
        assert one.logprob == pytest.approx(float(nats[place, one.token_id]), abs=2e-3)
        assert sum(math.exp(nat) for _, nat in one.alternatives) <= 1 + 1e-6
        if one.alternatives:  # openvino tells of the written token only
            likeliest = nats[place].topk(3)
            assert [token for token, _ in one.alternatives] == likeliest.indices.tolist()


def test_without_being_asked_no_logprobs_come(engine):
    assert asyncio.run(answer(engine, ids_of("hello"), Sampling(4)))[2] == []


SCHEMAS = [
    '{"type": "boolean"}',
    '{"enum": ["red", "green", 7, null]}',
    '{"type": "object", "properties": {"on": {"type": "boolean"}, "room": {"enum": ["hall", "attic"]}},'
    ' "required": ["on", "room"], "additionalProperties": false}',
    '{"type": "object", "properties": {"a": {"type": "integer", "minimum": 3, "maximum": 12}}, '
    '"required": ["a"], "additionalProperties": false}',
    '{"type": "array", "items": {"enum": ["x", "y"]}, "minItems": 2, "maxItems": 3}',
    '{"anyOf": [{"const": "a \\"b\\" \\u00e9"}, {"type": "null"}]}',
    '{"$defs": {"side": {"enum": ["left", "right"]}}, "type": "object", "properties": {"s": {"$ref": '
    '"#/$defs/side"}}, "required": ["s"], "additionalProperties": false}',
]


def test_an_answer_is_one_of_the_choices(engine):
    choices = ("billing", 'a "b", c', "prüfen", "bill")

    async def draw():
        prompt = ids_of("answer")
        wanted = [Sampling(60, temperature=1.2, seed=seed, choices=choices) for seed in range(6)]
        return await asyncio.gather(
            *(answer(engine, prompt, one) for one in [*wanted, Sampling(60, choices=choices)])
        )

    for ids, reason, _ in asyncio.run(draw()):
        assert reason == "stop"
        assert tiny().tokenizer.decode(ids, skip_special_tokens=True) in choices


@pytest.mark.parametrize("schema", SCHEMAS)
def test_an_answer_under_a_schema_fits_it(engine, schema):
    async def draw():
        prompt = ids_of("answer")
        wanted = [Sampling(200, temperature=1.2, seed=seed, json_schema=schema) for seed in range(6)]
        wanted.append(Sampling(200, json_schema=schema))
        return await asyncio.gather(*(answer(engine, prompt, one) for one in wanted))

    ended = 0
    for ids, reason, _ in asyncio.run(draw()):
        text = tiny().tokenizer.decode(ids, skip_special_tokens=True)
        if reason == "stop":
            ended += 1
            jsonschema.validate(json.loads(text), json.loads(schema))
        else:  # a random model may write white space for long
            assert len(ids) == 200
    assert ended >= 4


@pytest.mark.parametrize(
    "schema",
    [
        '{"type": "string", "maxLength": 3}',
        '{"type": "string", "pattern": "^[a-c]{2}$"}',
        '{"type": "array", "prefixItems": [{"type": "null"}], "items": {"type": "boolean"}, "maxItems": 2}',
        '{"type": "object", "patternProperties": {"^a$": {"type": "null"}}, "additionalProperties": false}',
    ],
)
def test_a_rarer_schema_is_held_or_refused(engine, schema):
    async def draw(seed):
        sampling = Sampling(100, temperature=1.2, seed=seed, json_schema=schema)
        return await answer(engine, ids_of("answer"), sampling)

    for seed in range(4):
        try:
            ids, reason, _ = asyncio.run(draw(seed))
        except SchemaUnsupported:
            continue
        assert reason == "stop"
        jsonschema.validate(json.loads(tiny().tokenizer.decode(ids)), json.loads(schema))


def test_an_answer_under_a_schema_that_is_cut_says_so(engine):
    schema = '{"type": "object", "properties": {"number": {"const": 12345678}}, "required": ["number"]}'
    ids, reason, _ = asyncio.run(answer(engine, ids_of("a"), Sampling(3, json_schema=schema)))
    assert reason == "length"
    assert len(ids) == 3
    assert tiny().tokenizer.decode(ids).lstrip().startswith("{")


@pytest.mark.parametrize(
    "schema",
    [
        "not json",
        "false",
        '{"type": "nope"}',
        '{"enum": []}',
        '{"$ref": "#/nowhere"}',
        '{"type": "integer", "minimum": 5, "maximum": 2}',
        '{"type": "array", "minItems": 3, "maxItems": 1}',
        '{"type": "object", "properties": {"a": false}, "required": ["a"]}',
        '{"allOf": [{"type": "string"}, {"type": "integer"}]}',
        '{"type": "string", "pattern": "(?<=a)b"}',
        '{"not": {}}',
    ],
)
def test_a_schema_that_nothing_fits_is_refused_and_harms_no_other(engine, schema):
    async def ask():
        other = asyncio.create_task(answer(engine, ids_of("hello"), Sampling(24)))
        with pytest.raises(SchemaUnsupported):
            await answer(engine, ids_of("a"), Sampling(8, json_schema=schema))
        return await other

    assert asyncio.run(ask())[:2] == expected(ids_of("hello"), 24)
    assert engine.broken is None


@pytest.mark.parametrize("count", [501, 2_000])
def test_a_schema_that_outgrows_the_grammar_ends_its_own_answer_alone(engine, count):
    properties = {f"k{n}": {"type": "string"} for n in range(count)}
    schema = json.dumps({"type": "object", "properties": properties})

    async def ask():
        other = asyncio.create_task(answer(engine, ids_of("hello"), Sampling(64)))
        with contextlib.suppress(SchemaUnsupported):  # some engines hold even this
            await answer(engine, ids_of("a"), Sampling(8, json_schema=schema))
        return await other

    assert asyncio.run(ask())[:2] == expected(ids_of("hello"), 64)
    assert engine.broken is None


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("temperature", [5e-324, 1e-5, 2.0])
def test_numbers_at_their_edges_are_sampled_with(engine, seed, temperature):
    sampling = Sampling(8, temperature, top_p=1e-320, seed=seed, json_schema='{"enum": ["ab", "cd"]}')
    first, again = (asyncio.run(answer(engine, ids_of("hello"), sampling))[0] for _ in range(2))
    assert first == again
    assert json.loads(tiny().tokenizer.decode(first)) in ("ab", "cd")
    assert engine.broken is None


def test_a_prompt_as_long_as_the_context_is_refused(engine):
    for size in (0, engine.context_tokens, engine.context_tokens + 1):
        with pytest.raises(ContextOverflow):
            asyncio.run(answer(engine, [5] * size, Sampling(8)))


def test_an_answer_ends_where_the_context_ends(engine):
    size = engine.context_tokens - 3
    ids, reason, _ = asyncio.run(answer(engine, [5] * size, Sampling(8, temperature=1.0, seed=1)))
    assert (len(ids), reason) == (3, "length") or reason == "stop"


def test_more_requests_than_may_wait_are_refused(make):
    engine = make(max_running=1, max_waiting=1)

    async def ask():
        tasks = [
            asyncio.create_task(answer(engine, ids_of("a"), Sampling(LONG, temperature=1.0, seed=n)))
            for n in range(2)
        ]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await answer(engine, ids_of("a"), Sampling(2))
        for task in tasks:
            task.cancel()

    asyncio.run(ask())


def test_closing_the_engine_ends_those_who_wait_and_refuses_others(make):
    engine = make(max_running=2)

    async def ask():
        tasks = [
            asyncio.create_task(
                answer(engine, ids_of("a"), Sampling(LONG, temperature=1.0, seed=n, json_schema=ENDLESS))
            )
            for n in range(64)  # so many that a quick engine is not through before it is closed
        ]
        while engine.load().running < 2:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(engine.close)
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(one, EngineError | tuple) for one in ended)
        assert any(isinstance(one, EngineError) for one in ended)
        with pytest.raises(EngineError, match="closed"):
            await answer(engine, ids_of("a"), Sampling(2))

    asyncio.run(ask())
    assert engine.broken is not None
    assert engine.load() == Load(0, 0)


def test_many_requests_from_several_loops_all_get_their_own_answer(engine):
    prompts = [ids_of(f"question {n}") for n in range(12)]
    answers = {}

    def ask(part):
        async def all_of_them():
            return await asyncio.gather(*(answer(engine, prompts[n], Sampling(10)) for n in part))

        for n, given in zip(part, asyncio.run(all_of_them()), strict=True):
            answers[n] = given[:2]

    threads = [threading.Thread(target=ask, args=(range(start, start + 4),)) for start in (0, 4, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {n: expected(prompt, 10) for n, prompt in enumerate(prompts)}


def score(ids):
    """Return the log-probabilities of a prompt from its second token, by the model itself."""
    import torch

    with torch.inference_mode():
        logits = tiny().model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return [logits[place, token].item() for place, token in enumerate(ids[1:])]


async def read_steps(engine, prompt, sampling):
    return [step async for step in engine.generate(prompt, sampling)]


PROMPTS = ["a", "ab", "turn on the lights é🙂", "x" * 150, "turn on the lights off"]


def test_log_probabilities_of_a_prompt_are_the_models_or_are_refused(make):
    engine = make(max_running=4, batch_tokens=16)
    wanted = Sampling(3, logprobs=2, prompt_logprobs=True)
    prompts = [ids_of(text) for text in PROMPTS]

    async def ask_twice():
        first = [read_steps(engine, prompt, Sampling(3)) for prompt in prompts]  # fills a cache of prefixes
        await asyncio.gather(*first)
        asked = [read_steps(engine, prompt, wanted) for prompt in prompts]
        others = [read_steps(engine, prompt, Sampling(3)) for prompt in prompts]
        return (await asyncio.gather(*asked, *others))[: len(prompts)]

    if engine.name == "openvino":
        with pytest.raises(Unsupported, match="log-probabilities of prompts"):
            asyncio.run(read_steps(engine, prompts[0], wanted))
        return
    for prompt, steps in zip(prompts, asyncio.run(ask_twice()), strict=True):
        first, *rest = steps
        assert [entry.token_id for entry in first.prompt_logprobs] == prompt[1:]
        assert [entry.logprob for entry in first.prompt_logprobs] == pytest.approx(score(prompt), abs=2e-3)
        assert all(len(entry.alternatives) == 2 for entry in first.prompt_logprobs)
        assert all(not step.prompt_logprobs for step in rest)


def test_the_end_of_turn_has_a_log_probability_of_its_own(engine):
    wanted = Sampling(20, logprobs=0, json_schema='{"enum": ["ab"]}')
    *before, last = asyncio.run(read_steps(engine, ids_of("a"), wanted))
    assert last.finish_reason == "stop"
    assert last.end is not None and last.end.logprob <= 0.0
    assert tiny().tokenizer.decode([last.end.token_id]) == "<|im_end|>"
    assert all(step.end is None for step in before)
