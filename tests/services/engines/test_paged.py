import asyncio
import os
import subprocess
import sys

import pytest

from services.engines.paged.blocks import BlockPool, PrefixCache
from services.engines.paged.engine import PagedEngine
from services.engines.paged.model import PagedModel, pad_count
from services.engines.paged.ngram_drafter import NgramDrafter, get_break_even_probability
from services.engines.paged.scheduler import MAX_SCORED_TOKENS
from services.engines.protocol import EngineError, Load, Sampling
from services.engines.sampling import Sampler
from stages.common.errors import InputError
from tests.services.engines.makers import tiny
from tests.services.engines.test_contract import answer, expected, ids_of, until_idle


def make_paged(**settings):
    made = tiny()
    settings = {"kv_cache_mib": 4, "threads": 1, "batch_tokens": 64, **settings}
    return PagedEngine(made.folder / "model.gguf", made.tokenizer, precision="float32", **settings)


@pytest.fixture
def make():
    made = []

    def build(**settings):
        made.append(make_paged(**settings))
        return made[-1]

    yield build
    for one in made:
        one.close()


def ask_all(engine, prompts, sampling):
    async def ask():
        return await asyncio.gather(*(answer(engine, prompt, sampling) for prompt in prompts))

    return asyncio.run(ask())


PROMPTS = ("hello", "what is this?", "a", "x" * 70, "the table")


@pytest.mark.parametrize("wrong", [False, True])
def test_speculative_tokens_right_or_wrong_do_not_change_an_answer(make, wrong):
    prompts = [ids_of(text) for text in PROMPTS]
    wanted = [expected(prompt, 24) for prompt in prompts]
    examples = [(p, ids[::-1] if wrong else ids) for p, (ids, _) in zip(prompts, wanted, strict=True)]
    engine = make(examples=examples)
    assert [one[:2] for one in ask_all(engine, prompts, Sampling(24))] == wanted
    assert (engine.scheduler.accepted > engine.scheduler.drafted / 2) is not wrong


def test_an_answer_given_before_is_proposed_the_next_time(make):
    engine = make()
    first = asyncio.run(answer(engine, ids_of("hello"), Sampling(24)))
    before = engine.scheduler.accepted
    assert asyncio.run(answer(engine, ids_of("hello"), Sampling(24))) == first
    assert engine.scheduler.accepted > before


def test_a_seed_draws_the_same_with_and_without_speculation(make):
    prompts = [ids_of(text) for text in PROMPTS]
    sampling = Sampling(24, temperature=0.7, top_p=0.9, seed=5, frequency_penalty=0.5, logprobs=1)
    plain = ask_all(make(speculate=False), prompts, sampling)
    examples = [(prompt, ids) for prompt, (ids, _, _) in zip(prompts, plain, strict=True)]
    engine = make(examples=examples)
    speculated = ask_all(engine, prompts, sampling)
    assert [one[:2] for one in speculated] == [one[:2] for one in plain]
    assert engine.scheduler.accepted > 0


def test_a_prompt_whose_tokens_are_scored_leaves_a_step_short_while_others_generate(make, monkeypatch):
    steps, step = [], PagedModel.step
    scored = Sampling(1, logprobs=2, prompt_logprobs=True)
    prompts = [ids_of("y" * 150), ids_of("z" * 70)]

    def count_and_step(model, inputs):
        steps.append([(len(one.token_ids), one.rows) for one in inputs])
        return step(model, inputs)

    async def score(engine, prompt):
        (first,) = [step async for step in engine.generate(prompt, scored)]
        return [entry.token_id for entry in first.prompt_logprobs], first.prompt_logprobs[-1].logprob

    async def among_others(engine):
        others = asyncio.create_task(answer(engine, ids_of("hello"), Sampling(200)))
        while not steps:
            await asyncio.sleep(0.001)
        return await asyncio.gather(*(score(engine, prompt) for prompt in prompts)), await others

    monkeypatch.setattr(PagedModel, "step", count_and_step)
    engine = make(speculate=False)
    found, other = asyncio.run(among_others(engine))
    # Those that generate come first, with one token each.
    busy = [[rows for _, rows in one[1:]] for one in steps if len(one) > 1 and one[0][0] == 1]
    assert len(busy) > 10 and max(map(sum, busy)) <= MAX_SCORED_TOKENS
    assert other[:2] == expected(ids_of("hello"), 200)
    for (ids, last), prompt in zip(found, prompts, strict=True):
        assert ids == prompt[1:]
        assert last == pytest.approx(asyncio.run(score(engine, prompt))[1], abs=1e-3)


@pytest.mark.parametrize("shared", [1, 17, 31, 32, 33, 80])
def test_a_prompt_that_begins_like_another_gets_its_own_answer(make, shared):
    engine = make()
    beginning = ids_of("the same words at the beginning of all; " * 3)[:shared]
    for end in ("one", "another", "one", "o"):
        prompt = beginning + ids_of(end)
        assert asyncio.run(answer(engine, prompt, Sampling(12)))[:2] == expected(prompt, 12)


def test_blocks_that_run_out_are_taken_from_the_youngest_and_all_answers_come_whole(make):
    # 1 MiB holds 8,192 tokens of this model; 24 answers of 480 take 11,520.
    engine = make(kv_cache_mib=1, max_running=24, speculate=False)
    count = 480
    prompts = [ids_of(f"question {n}") for n in range(24)]
    endless = '{"type": "array", "items": {"type": "boolean"}, "minItems": 1000}'
    sampling = Sampling(count, temperature=1.0, seed=1, json_schema=endless)
    crowded = ask_all(engine, prompts, sampling)
    assert engine.scheduler.preempted > 0
    assert crowded == ask_all(make(kv_cache_mib=16, max_running=24, speculate=False), prompts, sampling)


def test_an_aborted_answer_leaves_its_blocks_to_others(make):
    engine = make()
    room = engine.scheduler.free_blocks

    async def leave():
        for n in range(40):
            stream = engine.generate(ids_of(f"question {n}"), Sampling(400, temperature=1.5))
            await anext(stream)
            await stream.aclose()
        while engine.load() != Load(0, 0):
            await asyncio.sleep(0.001)
        await until_idle(engine)
        await answer(engine, ids_of("hello"), Sampling(2))

    asyncio.run(leave())
    while engine.scheduler._prefixes.drop_oldest():
        pass
    assert engine.scheduler.free_blocks == room


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_sampler_that_fails_ends_its_answer_alone_and_its_blocks_are_free_again(make, monkeypatch, after):
    engine = make(speculate=False)
    room = engine.scheduler.free_blocks
    sample = Sampler.sample

    def fail(sampler, logits, likeliest):
        if sampler._sampling.seed == 13:
            if sampler._sampling.max_tokens - 24 == len(drawn):
                raise KeyError("an unforeseen fault")
            drawn.append(likeliest)
        return sample(sampler, logits, likeliest)

    drawn = []
    monkeypatch.setattr(Sampler, "sample", fail)

    async def ask():
        one = answer(engine, ids_of("question"), Sampling(24 + after, seed=13))
        others = (answer(engine, ids_of(text), Sampling(24)) for text in PROMPTS)
        return await asyncio.gather(one, *others, return_exceptions=True)

    failed, *others = asyncio.run(ask())
    assert isinstance(failed, EngineError) and "unforeseen" in str(failed)
    assert [one[:2] for one in others] == [expected(ids_of(text), 24) for text in PROMPTS]
    assert engine.broken is None
    while engine.scheduler._prefixes.drop_oldest():
        pass
    assert engine.scheduler.free_blocks == room


def test_a_cache_too_small_for_a_block_is_refused():
    with pytest.raises(InputError, match="has no room for"):
        make_paged(kv_cache_mib=0)


def test_a_file_that_is_no_model_is_refused(tmp_path):
    file = tmp_path / "model.gguf"
    for content in (b"", b"GGUF but no more", b"something else altogether"):
        file.write_bytes(content)
        with pytest.raises(InputError, match="cannot be read"):
            PagedEngine(file, tiny().tokenizer)


def test_shared_blocks_are_free_when_the_last_holder_lets_go():
    pool = BlockPool(2)
    block = pool.take()
    pool.share([block])
    pool.give_back([block])
    assert pool.free == 1
    pool.give_back([block])
    assert pool.free == 2


def test_the_prefix_cache_finds_the_longest_beginning_and_drops_the_least_used():
    pool = BlockPool(3)
    prefixes = PrefixCache(pool)
    blocks = [pool.take() for _ in range(3)]
    for tokens, block in zip(([1, 2, 3], [1, 2, 4, 5], [9]), blocks, strict=True):
        prefixes.keep(tokens, [block])
    assert prefixes.find([1, 2, 4, 6]) == (3, [blocks[1]])
    assert prefixes.find([7]) == (0, [])
    prefixes.drop_oldest()
    assert prefixes.find([1, 2, 3]) == (2, [blocks[1]])


def test_keywords_of_the_prompt_decide_between_known_answers():
    drafter = NgramDrafter()
    for _ in range(5):
        drafter.learn([1, 50, 2], [10, 11, 0])
        drafter.learn([1, 60, 2], [10, 12, 0])
        drafter.learn([1, 70, 2], [10, 13, 0])
    for word, token in ((50, 11), (60, 12), (70, 13)):
        keywords = drafter.get_keywords([1, word, 2])
        assert keywords == [word]
        assert drafter.propose(keywords, [], 8, 0.3) == [10, token, 0]
    assert drafter.propose(drafter.get_keywords([1, 50, 2]), [10], 1, 0.3) == [11]
    assert drafter.propose(drafter.get_keywords([1, 50, 2]), [99], 8, 0.3) == []


def test_what_is_forgotten_is_not_proposed():
    drafter = NgramDrafter(capacity=1)
    drafter.learn([1], [10, 11])
    drafter.learn([1], [20, 21])
    assert drafter.propose([], [10], 4, 0.1) == []
    assert drafter.propose([], [20], 4, 0.1) == [21]


def test_more_sequences_at_once_need_surer_tokens():
    minimums = [get_break_even_probability(running) for running in (1, 8, 32, 128)]
    assert minimums == sorted(minimums)
    assert minimums[0] < 0.1 < 0.5 < minimums[2]


def test_steps_are_padded_little():
    assert all(0 <= pad_count(count) - count < max(4, count / 8) for count in range(1, 1000))


def test_where_onednn_may_not_compute_bfloat16_it_is_float32():
    """OpenVINO reports bfloat16 all the same, and its first step fails. oneDNN reads it once."""
    code = (
        "import sys; from pathlib import Path; from services.engines.paged.model import PagedModel; "
        "model = PagedModel(Path(sys.argv[1]), cache_mib=4, threads=1); model.warm_up(64); print(model.dtype)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tiny().folder / "model.gguf")],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == ["float32"]
