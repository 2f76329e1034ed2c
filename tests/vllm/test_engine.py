"""The engine `vllm` on vLLM itself: answers, adapters, and what ends its process."""

import asyncio
import json
import signal
import time

import psutil
import pytest

from services.engines.calls.allowed import AllowedCalls
from services.engines.calls.grammar import write_grammar
from services.engines.calls.notation import read_marks
from services.engines.calls.reading import AnswerReader, join_pieces
from services.engines.grammar import set_whitespace
from services.engines.protocol import EngineError, Sampling
from services.engines.vllm import VllmEngine
from services.model_pool import LoadedModel, ModelPool
from services.versions.aliases import Aliases, Challenger, write_aliases
from services.versions.store import ModelFiles
from stages.common.chat.tools_template import adapt_template
from stages.common.errors import InputError
from stages.common.messages import Tool
from stages.common.model.loading import load_tokenizer
from tests.services.tool_models import TOOLS, find_call_fault
from tests.vllm.models import make_adapter, make_base

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(900)]

SETTINGS = {"max_running": 8, "context_tokens": 256, "gpu_memory": 0.1, "drain_s": 60.0}
PROMPT = list(range(40, 60))
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [make_adapter(folder / str(seed), seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def engine(base, run):
    made = VllmEngine(base, None, load_tokenizer(base), **SETTINGS)
    yield made
    run(close(made))


async def close(engine):
    engine.close()
    await asyncio.sleep(1)


async def answer(engine, sampling, prompt=PROMPT):
    steps = [step async for step in engine.generate(prompt, sampling)]
    return [token for step in steps for token in step.token_ids], steps


def processes():
    """Return vLLM's own processes."""
    found = [child for child in psutil.Process().children(recursive=True) if "EngineCore" in child.name()]
    return found or [
        child for child in psutil.Process().children(recursive=True) if "spawn_main" in str(child.cmdline())
    ]


def test_answers_are_those_of_transformers_and_equal_for_equal_seeds(engine, base, run):
    import torch

    from stages.common.model.loading import load_base

    model = load_base(base, torch.bfloat16, torch.device("cpu"))
    greedy = model.generate(torch.tensor([PROMPT]), max_new_tokens=4, do_sample=False)[0, len(PROMPT) :]
    ids, steps = run(answer(engine, Sampling(4, logprobs=2)))
    assert ids == greedy.tolist()
    assert steps[-1].finish_reason == "length"
    found = [entry for step in steps for entry in step.logprobs]
    assert [entry.token_id for entry in found] == ids and all(entry.logprob <= 0 for entry in found)
    drawn = [run(answer(engine, Sampling(12, 1.0, seed=seed)))[0] for seed in (7, 7, -1, 8)]
    assert drawn[0] == drawn[1] and len({tuple(ids) for ids in drawn}) == 3


def test_answers_fit_a_schema(engine, base, run):
    tokenizer = load_tokenizer(base)
    for seed in range(4):
        ids, _ = run(answer(engine, Sampling(64, 1.0, seed=seed, json_schema=SCHEMA)))
        assert isinstance(json.loads(tokenizer.decode(ids))["a"], bool)


def test_calls_are_whole(engine, base, run):
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = adapt_template(tokenizer, {}, True, "default")
    marks = read_marks(tokenizer)
    allowed = AllowedCalls(tuple(Tool(json.dumps(tool)) for tool in TOOLS), mode="required")
    grammar = write_grammar(marks, allowed)
    finished = 0
    for seed in range(6):
        sampling = Sampling(200, 1.0, seed=seed, grammar=grammar.text, calls=grammar.form)
        ids, steps = run(answer(engine, sampling))
        if steps[-1].finish_reason != "stop":
            continue
        finished += 1
        reader = AnswerReader(marks.calls, None)
        for call in join_pieces([reader.push(tokenizer.decode(ids), is_last=True)]).calls:
            function = {"name": call.name, "arguments": call.arguments}
            assert find_call_fault({"id": call.id, "type": "function", "function": function}, TOOLS) is None
        assert reader.has_calls
    assert finished


@pytest.mark.parametrize(("text", "fits"), [('{"a": 1}', True), ('{"a":1}', True), ('{"a":\n1}', False)])
def test_vllm_allows_the_white_space_of_the_other_engines(base, text, fits):
    from llguidance import LLMatcher
    from llguidance.hf import from_tokenizer
    from vllm.v1.structured_output.backend_guidance import serialize_guidance_grammar
    from vllm.v1.structured_output.backend_types import StructuredOutputOptions

    tokenizer = load_tokenizer(base)
    schema = set_whitespace('{"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}')
    grammar = serialize_guidance_grammar(StructuredOutputOptions.JSON, schema, True)
    matcher = LLMatcher(from_tokenizer(tokenizer, n_vocab=258, eos_token=1), grammar)
    ids = tokenizer(text)["input_ids"]
    assert (matcher.validate_tokens(ids) == len(ids)) is fits


def test_adapters_answer_side_by_side_each_its_own(engine, base, adapters, run):
    tokenizer = load_tokenizer(base)
    others = [VllmEngine(base, adapter, tokenizer, **SETTINGS) for adapter in adapters]

    async def ask_all():
        return await asyncio.gather(*(answer(one, Sampling(12)) for one in (engine, *others)))

    together = [ids for ids, _ in run(ask_all())]
    assert len({tuple(ids) for ids in together}) == 3
    assert [run(answer(one, Sampling(12)))[0] for one in (engine, *others)] == together
    for one in others:
        run(close(one))
    assert run(answer(engine, Sampling(12)))[0] == together[0]


def test_an_adapter_that_cannot_be_loaded_leaves_the_others_alone(engine, base, tmp_path, run):
    tokenizer = load_tokenizer(base)
    with pytest.raises(InputError, match="has rank 65"):
        VllmEngine(base, make_adapter(tmp_path / "rank", 3, rank=65), tokenizer, **SETTINGS)
    broken = make_adapter(tmp_path / "broken", 3)
    (broken / "adapter_model.safetensors").write_bytes(b"no weights")
    config = json.loads((broken / "adapter_config.json").read_text())
    dora = make_adapter(tmp_path / "dora", 3)
    (dora / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    gone = make_adapter(tmp_path / "gone", 3)
    (gone / "adapter_model.safetensors").unlink()
    for folder in (broken, dora, gone):
        other = VllmEngine(base, folder, tokenizer, **SETTINGS)
        with pytest.raises(EngineError, match="cannot load the adapter"):
            run(answer(other, Sampling(2)))
        assert engine.broken is None
        run(close(other))
    assert len(run(answer(engine, Sampling(4)))[0]) == 4


def test_answers_are_finished_after_sigterm_has_reached_vllms_process(base, run):
    """BentoML sends it to the processes of its workers too. This vLLM is the one of all tests above."""
    made = VllmEngine(base, None, load_tokenizer(base), **SETTINGS)

    async def ask_and_stop():
        asked = [asyncio.create_task(answer(made, Sampling(200, 1.0, seed=n))) for n in range(6)]
        while made.load().running < 6:
            await asyncio.sleep(0.01)
        for process in processes():
            process.send_signal(signal.SIGTERM)
        return await asyncio.gather(*asked)

    for _, steps in run(ask_and_stop()):
        assert steps[-1].finish_reason in ("length", "stop")
    wait_until(lambda: made.broken is not None)
    with pytest.raises(EngineError):
        run(answer(made, Sampling(2)))
    run(close(made))


def test_a_dead_vllm_is_started_again_with_all_its_versions(base, adapters, tmp_path, run):
    tags = ["m:" + name * 12 for name in "ab"]

    def load(tag):
        adapter = adapters[tags.index(tag)]
        about = {"name": "m", "version": tag[2:], "system_prompt": None}
        files = ModelFiles("m", tag[2:], base, None, base, adapter, about)
        tokenizer = load_tokenizer(base)
        return LoadedModel(files, tokenizer, VllmEngine(base, adapter, tokenizer, **SETTINGS))

    pool = ModelPool(load, path=tmp_path / "aliases.json")
    write_aliases(pool.path, Aliases(tags[0], Challenger(tags[1], 0.5, "canary")))

    async def follow(condition):
        until = time.monotonic() + 400
        while not condition():
            assert time.monotonic() < until, pool.find_problem()
            await pool.sync()
            await asyncio.sleep(0.1)

    def both_work():
        models = pool.get_models().values() if pool.problem is None else ()
        return len(models) == 2 and all(model.engine.broken is None for model in models)

    run(follow(both_work))
    before = [run(answer(model.engine, Sampling(8)))[0] for model in pool.get_models().values()]
    for process in processes():
        process.kill()
    wait_until(lambda: pool.champion.engine.broken is not None)
    assert pool.find_problem() is not None and not pool.is_dead()
    run(follow(both_work))
    after = [run(answer(model.engine, Sampling(8)))[0] for model in pool.get_models().values()]
    assert after == before
    pool.close()


def wait_until(condition):
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.05)
