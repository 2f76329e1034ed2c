"""What is asked of vLLM, and what its answers become. A stand-in plays vLLM; `tests/vllm` runs it."""

import asyncio
import json
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest

from services.engines.protocol import (
    ContextOverflow,
    EngineError,
    Load,
    Sampling,
    SchemaUnsupported,
    TokenLogprob,
)
from services.engines.vllm import VllmEngine
from stages.common.errors import InputError
from tests.services.engines.makers import tiny


class EngineDeadError(Exception):
    pass


class StandIn:
    """Plays the outputs it is given; notes what it was asked."""

    def __init__(self, arguments):
        self.arguments = arguments
        self.model_config = SimpleNamespace(max_model_len=64, get_vocab_size=lambda: 260)
        self.asked, self.ended, self.removed, self.added = [], [], [], []
        self.environment = dict(os.environ)
        self.errored = self.down = False
        self.outputs = []
        self.error = None

    @classmethod
    def from_engine_args(cls, arguments):
        if arguments.gpu_memory_utilization > 1:
            raise RuntimeError("Engine core initialization failed")
        return cls(arguments)

    async def generate(self, prompt, parameters, number, lora_request=None):
        self.asked.append((prompt, parameters, lora_request))
        try:
            if self.error is not None:
                raise self.error
            for output in self.outputs:
                yield SimpleNamespace(outputs=[output])
            await asyncio.sleep(60)
        finally:
            self.ended.append(number)

    async def abort(self, numbers):
        pass

    async def add_lora(self, lora):
        if "bad" in lora.lora_path:
            raise Exception("Call to add_lora method failed: no such layer")
        self.added.append(lora.lora_int_id)

    async def remove_lora(self, number):
        self.removed.append(number)

    def shutdown(self):
        self.down = True


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    names = {
        "vllm": {"SamplingParams": SimpleNamespace},
        "vllm.config": {"StructuredOutputsConfig": SimpleNamespace},
        "vllm.engine": {},
        "vllm.engine.arg_utils": {"AsyncEngineArgs": SimpleNamespace},
        "vllm.engine.async_llm_engine": {"AsyncLLMEngine": StandIn},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": SimpleNamespace},
        "vllm.sampling_params": {
            "RequestOutputKind": SimpleNamespace(DELTA="delta"),
            "StructuredOutputsParams": SimpleNamespace,
        },
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.exceptions": {
            "EngineDeadError": EngineDeadError,
            "EngineGenerateError": EngineDeadError,
        },
    }
    for name, members in names.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)


def make_adapter(folder, config='{"r": 80}'):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(config)
    return folder


@pytest.fixture
def adapter(tmp_path):
    return make_adapter(tmp_path / "adapter")


@pytest.fixture
def engine(adapter):
    made = VllmEngine(tiny().folder, adapter, tiny().tokenizer, max_running=2, max_waiting=1)
    yield made
    made.close()


def output(ids, reason=None, logprobs=None):
    return SimpleNamespace(token_ids=ids, finish_reason=reason, logprobs=logprobs)


def ask(engine, sampling, prompt=(5, 6)):
    async def collect():
        return [step async for step in engine.generate(prompt, sampling)]

    return asyncio.run(collect())


def test_tokens_come_without_the_end_of_turn(engine):
    engine._core.model.outputs = [output([7]), output([8, 9]), output([1], "stop")]
    steps = ask(engine, Sampling(8))
    assert [step.token_ids for step in steps] == [(7,), (8, 9), ()]
    assert [step.finish_reason for step in steps] == [None, None, "stop"]
    assert engine.load() == Load(0, 0)


def test_the_parameters_are_translated(engine):
    engine._core.model.outputs = [output([7], "length")]
    ask(engine, Sampling(100, 0.7, 0.9, 3, 0.1, 0.2, 4, '{"type": "boolean"}'))
    prompt, parameters, lora = engine._core.model.asked[0]
    assert prompt == {"prompt_token_ids": [5, 6]}
    assert parameters.max_tokens == 62  # the context has 64
    assert (parameters.temperature, parameters.top_p, parameters.seed) == (0.7, 0.9, 3)
    assert (parameters.frequency_penalty, parameters.presence_penalty, parameters.logprobs) == (0.1, 0.2, 4)
    assert json.loads(parameters.structured_outputs.json) == {
        "type": "boolean",
        "x-guidance": {"whitespace_pattern": "[ ]?"},
    }
    assert (parameters.stop_token_ids, parameters.output_kind) == ([1], "delta")
    assert lora.lora_int_id == 1


def test_logprobs_are_the_written_tokens_and_the_best_others(engine):
    table = {n: SimpleNamespace(logprob=nats) for n, nats in ((7, -2.0), (8, -0.5), (9, -1.0))}
    engine._core.model.outputs = [output([7], "length", [table])]
    (step,) = ask(engine, Sampling(1, logprobs=2))
    assert step.logprobs == (TokenLogprob(7, -2.0, ((8, -0.5), (9, -1.0))),)


def test_a_rank_between_vllms_gets_the_next(engine):
    assert engine._core.model.arguments.max_lora_rank == 128


def test_an_adapter_that_the_running_vllm_has_no_room_for_is_refused_before_vllm_sees_it(engine, tmp_path):
    for config in ('{"r": 200}', '{"r": 8, "rank_pattern": {"q_proj": 256}}'):
        folder = make_adapter(tmp_path / str(len(config)), config)
        with pytest.raises(InputError, match=r"has rank (200|256), and the running vLLM reserved 128"):
            VllmEngine(tiny().folder, folder, tiny().tokenizer)
    assert engine.broken is None


def test_an_adapter_that_vllm_cannot_load_is_an_error_and_no_request_of_it_reaches_vllm(engine, tmp_path):
    other = VllmEngine(tiny().folder, make_adapter(tmp_path / "bad"), tiny().tokenizer)
    with pytest.raises(EngineError, match="no such layer"):
        ask(other, Sampling(1))
    assert engine._core.model.asked == [] and engine.broken is None
    other.close()


def test_an_adapter_is_loaded_once_and_before_its_first_request(engine):
    engine._core.model.outputs = [output([7], "length")]
    ask(engine, Sampling(1))
    ask(engine, Sampling(1))
    assert engine._core.model.added == [1]


def test_a_vllm_that_has_ended_is_started_anew(engine, adapter):
    dead = engine._core.model
    dead.errored = True
    other = VllmEngine(tiny().folder, adapter, tiny().tokenizer)
    assert other._core.model is not dead and other.broken is None
    assert dead.down, "it may hold memory of the GPU"
    assert engine.broken
    engine.close()
    third = VllmEngine(tiny().folder, adapter, tiny().tokenizer)
    assert third._core is other._core, "closing an engine of the dead one leaves the new one"
    other.close()
    third.close()


def test_a_vllm_that_does_not_start_is_an_engine_error_and_not_kept():
    with pytest.raises(EngineError, match="initialization failed"):
        VllmEngine(tiny().folder, None, tiny().tokenizer, gpu_memory=2.0)
    made = VllmEngine(tiny().folder, None, tiny().tokenizer)
    assert made.broken is None
    made.close()


def test_vllm_starts_its_process_by_spawn_and_compiles_no_sampler(engine):
    assert engine._core.model.environment["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert engine._core.model.environment["VLLM_USE_FLASHINFER_SAMPLER"] == "0"


def test_vllm_finishes_its_answers_after_sigterm():
    made = VllmEngine(tiny().folder, None, tiny().tokenizer, drain_s=119.5)
    assert made._core.model.arguments.shutdown_timeout == 120
    made.close()


def test_closing_the_generator_aborts(engine):
    engine._core.model.outputs = [output([7])]

    async def leave():
        steps = engine.generate([5], Sampling(8))
        await anext(steps)
        assert engine.load() == Load(0, 1)
        await steps.aclose()

    asyncio.run(leave())
    assert engine._core.model.ended == ["0"]
    assert engine.load() == Load(0, 0)


def test_versions_share_the_base_model_and_unload_their_adapter(engine, adapter):
    other = VllmEngine(tiny().folder, adapter, tiny().tokenizer)
    core = other._core.model
    assert core is engine._core.model
    core.outputs = [output([7], "length")]

    async def serve_and_close():
        async for _ in other.generate([5], Sampling(1)):
            pass
        other.close()
        while not core.removed:
            await asyncio.sleep(0)

    asyncio.run(serve_and_close())
    assert core.asked[0][2].lora_int_id == 2
    assert core.removed == [2]
    assert not core.down
    engine.close()
    assert core.down


def test_what_cannot_be_answered_is_refused_before_vllm_is_asked(engine):
    with pytest.raises(ContextOverflow):
        ask(engine, Sampling(1), [5] * 64)
    with pytest.raises(SchemaUnsupported):
        ask(engine, Sampling(1, json_schema='{"enum": []}'))
    assert engine._core.model.asked == []


def test_a_vllm_that_is_gone_is_an_engine_error(engine):
    engine._core.model.error = EngineDeadError("gone")
    with pytest.raises(EngineError, match="gone"):
        ask(engine, Sampling(1))
    engine._core.model.errored = True
    assert engine.broken
    with pytest.raises(EngineError):
        ask(engine, Sampling(1))


def test_an_aborted_answer_is_an_engine_error(engine):
    engine._core.model.outputs = [output([], "abort")]
    with pytest.raises(EngineError, match="abort"):
        ask(engine, Sampling(1))
    assert engine.broken, "its process got SIGTERM; requests get 503 and not 500"


def test_without_vllm_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match="vllm is not installed") as refused:
        VllmEngine(tiny().folder, None, tiny().tokenizer)
    assert "pip install '.[gpu]'" in refused.value.fix
