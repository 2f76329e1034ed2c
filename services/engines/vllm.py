"""The CUDA engine: vLLM, with one base model in memory and an adapter for each fine-tuned version.

Written for vLLM 0.32 (`AsyncLLM`). vLLM computes in a separate process; this module translates.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from services.engines.grammar import Grammars, compile_apart, set_whitespace
from services.engines.protocol import (
    ContextOverflow,
    EngineError,
    FinishReason,
    Load,
    QueueFull,
    Sampling,
    SchemaUnsupported,
    Step,
    TokenLogprob,
    Unsupported,
)
from stages.common.artifacts import hash_files
from stages.common.chat.template import end_of_turn_ids
from stages.common.errors import InputError

# LoRA ranks that vLLM can reserve; an adapter gets the next larger one.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class VllmEngine:
    """Generate with vLLM; engines with the same base model share it in memory.

    Args:
        base: folder of the base model.
        adapter: folder of the adapter; None for the base model alone.
        context_tokens: limit of prompt and answer together; None for the model's own.
        max_adapters: versions served at the same time, such as champion and challenger.
        gpu_memory: share of the GPU's memory for vLLM.
        drain_s: time to finish answers in once SIGTERM has reached vLLM's process.

    Raises:
        InputError: vLLM is not installed, or the adapter's rank is too high for it.
        EngineError: vLLM does not start.
    """

    name = "vllm"

    def __init__(
        self,
        base: Path,
        adapter: Path | None,
        tokenizer: Any,
        *,
        max_running: int = 64,
        max_waiting: int = 256,
        context_tokens: int | None = None,
        max_adapters: int = 3,
        gpu_memory: float = 0.9,
        drain_s: float = 0.0,
    ) -> None:
        self.max_running = max_running
        self._max_waiting = max_waiting
        self._vllm = _import_vllm()
        self._end_ids = frozenset(end_of_turn_ids(tokenizer))
        arguments = {
            "model": str(base),
            "enable_lora": True,
            "max_loras": max_adapters,
            "max_lora_rank": pick_rank(adapter),
            "max_num_seqs": max_running,
            "max_model_len": context_tokens,
            "gpu_memory_utilization": gpu_memory,
            "enable_prefix_caching": True,
            # llguidance, as in the other engines, so that schemas mean the same everywhere.
            "structured_outputs_config": self._vllm.StructuredOutputsConfig(
                backend="guidance", disable_any_whitespace=True
            ),
            "disable_log_stats": True,
            "shutdown_timeout": math.ceil(drain_s),
        }
        self._core = _share_core(_hash_model(base), self._vllm, arguments)
        if adapter is not None:
            _check_rank(adapter, self._core.max_rank)
        settings = self._core.model.model_config
        self.context_tokens: int = settings.max_model_len
        self._grammars = Grammars(tokenizer, settings.get_vocab_size(), min(self._end_ids))
        self._lora = None if adapter is None else self._make_lora(adapter)
        self._lora_loaded = adapter is None
        self._core.users += 1
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: set[str] = set()
        self._running: set[str] = set()
        self._closed: str | None = None

    @property
    def broken(self) -> str | None:
        """Why the engine accepts no more requests; None while it works."""
        return self._closed or ("vLLM's process has ended" if self._core.has_ended else None)

    def load(self) -> Load:
        """Return the numbers of requests waiting for their first token, and of running ones."""
        return Load(len(self._waiting), len(self._running))

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncIterator[Step]:
        """Generate an answer to a prompt; see `Engine.generate`."""
        await self._check(prompt, sampling)
        self._loop = asyncio.get_running_loop()
        await self._load_lora()
        number = str(next(self._core.numbers))
        self._waiting.add(number)
        outputs = self._core.model.generate(
            {"prompt_token_ids": list(prompt)},
            self._make_parameters(sampling, self.context_tokens - len(prompt)),
            number,
            lora_request=self._lora,
        )
        try:
            async for output in outputs:
                self._waiting.discard(number)
                self._running.add(number)
                step = self._step(output.outputs[0], sampling)
                if sampling.prompt_logprobs and (tables := getattr(output, "prompt_logprobs", None)):
                    step = replace(step, prompt_logprobs=_read_prompt(prompt, tables, sampling))
                yield step
                if step.finish_reason is not None:
                    return
            raise EngineError(self._closed or "vLLM ended an answer without a reason")
        except (self._vllm.EngineDeadError, self._vllm.EngineGenerateError) as error:
            raise EngineError(f"vLLM failed: {error}") from error
        except ValueError as error:  # vLLM rejects a request with one
            kind = SchemaUnsupported if sampling.is_constrained else EngineError
            raise kind(f"vLLM rejects the request: {error}") from error
        finally:
            self._waiting.discard(number)
            self._running.discard(number)
            await outputs.aclose()  # aborts an unfinished answer

    async def _check(self, prompt: Sequence[int], sampling: Sampling) -> None:
        if reason := self.broken:
            raise EngineError(reason)
        if sampling.embeds_prompt:
            raise Unsupported("the vllm engine has no vectors of prompts; use paged or transformers")
        if not prompt or len(prompt) >= self.context_tokens:
            raise ContextOverflow(
                f"the prompt has {len(prompt)} tokens, and the context {self.context_tokens} with the answer"
            )
        if len(self._waiting) + len(self._running) >= self.max_running + self._max_waiting:
            raise QueueFull(f"{len(self._running)} requests run and {len(self._waiting)} wait already")
        await compile_apart(self._grammars.compile_for, sampling)

    async def _load_lora(self) -> None:
        """Load the adapter by itself: if that fails within a step of requests, vLLM's process ends."""
        if self._lora_loaded:
            return
        try:
            await self._core.model.add_lora(self._lora)
        except Exception as error:  # vLLM's call to its process raises nothing narrower
            raise EngineError(f"vLLM cannot load the adapter: {error}") from error
        self._lora_loaded = True

    def _make_parameters(self, sampling: Sampling, room: int) -> Any:
        structured = None
        if sampling.json_schema is not None:
            structured = self._vllm.StructuredOutputsParams(json=set_whitespace(sampling.json_schema))
        elif sampling.grammar is not None:
            structured = self._vllm.StructuredOutputsParams(grammar=sampling.grammar)
        elif sampling.choices:
            structured = self._vllm.StructuredOutputsParams(choice=list(sampling.choices))
        return self._vllm.SamplingParams(
            max_tokens=min(sampling.max_tokens, room),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=None if sampling.seed is None else sampling.seed % 2**63,  # vLLM reads -1 as no seed
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            logprobs=sampling.logprobs,
            prompt_logprobs=sampling.logprobs if sampling.prompt_logprobs else None,
            stop_token_ids=sorted(self._end_ids),
            detokenize=False,
            output_kind=self._vllm.RequestOutputKind.DELTA,
            structured_outputs=structured,
        )

    def _step(self, output: Any, sampling: Sampling) -> Step:
        ids = tuple(output.token_ids)
        tables = list(output.logprobs or ())
        reason: FinishReason | None = None
        if output.finish_reason is not None:
            if output.finish_reason not in ("stop", "length"):
                # Its process aborts what comes after SIGTERM; what we abort ourselves has no output.
                self._core.ending |= output.finish_reason == "abort"
                raise EngineError(self._closed or f"vLLM ended an answer: {output.finish_reason}")
            reason = "stop" if output.finish_reason == "stop" else "length"
        entries: tuple[TokenLogprob, ...] = ()
        if sampling.logprobs is not None:
            pairs = zip(ids, tables, strict=False)
            entries = tuple(_logprob(token, table, sampling.logprobs) for token, table in pairs)
        if not (ids and ids[-1] in self._end_ids):
            return Step(ids, reason, entries)
        end = entries[-1] if len(entries) == len(ids) else None
        return Step(ids[:-1], reason, entries[: len(ids) - 1], end=end)

    def close(self) -> None:
        """Unload the adapter; the last engine of a base model stops vLLM's process."""
        if self._closed is not None:
            return
        self._closed = "the engine is closed"
        self._core.users -= 1
        if not self._core.users and _CORES.get(self._core.key) is self._core:
            del _CORES[self._core.key]
        if self._loop is not None and not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(self._unload(), self._loop)
        elif not self._core.users:
            self._core.model.shutdown()

    async def _unload(self) -> None:
        """Abort running requests first: vLLM does not notify their callers when it shuts down."""
        await self._core.model.abort([*self._waiting, *self._running])
        if not self._core.users:
            self._core.model.shutdown()
        elif self._lora is not None:
            await self._core.model.remove_lora(self._lora.lora_int_id)

    def _make_lora(self, adapter: Path) -> Any:
        number = next(self._core.adapters)
        return self._vllm.LoRARequest(
            lora_name=f"adapter-{number}", lora_int_id=number, lora_path=str(adapter)
        )


class _Core:
    """A vLLM process, shared by the engines of all adapters of one base model.

    Attributes:
        max_rank: of the adapters that it can load.
        users: engines that are not closed.
        ending: its process takes no more requests, and ends when it has answered the others.
    """

    def __init__(self, key: str, model: Any, max_rank: int) -> None:
        self.key = key
        self.model = model
        self.max_rank = max_rank
        self.users = 0
        self.ending = False
        self.numbers = itertools.count()
        self.adapters = itertools.count(1)  # 0 means no adapter to vLLM

    @property
    def has_ended(self) -> bool:
        """Whether its process takes no more requests."""
        return self.ending or bool(self.model.errored)


_CORES: dict[str, _Core] = {}  # by content of the base model, since each version has its own folder


def _share_core(key: str, vllm: Any, arguments: dict[str, Any]) -> _Core:
    """Return the running vLLM of a base model; start it if there is none, or if it has ended.

    Raises:
        EngineError: it does not start.
    """
    core = _CORES.get(key)
    if core is not None and core.has_ended:
        del _CORES[key]
        core.model.shutdown()  # what is left of it holds memory of the GPU
        core = None
    if core is None:
        try:
            model = vllm.AsyncLLMEngine.from_engine_args(vllm.AsyncEngineArgs(**arguments))
        except Exception as error:  # of CUDA, torch or vLLM
            raise EngineError(f"vLLM does not start, its log has the cause: {error}") from error
        core = _CORES[key] = _Core(key, model, arguments["max_lora_rank"])
    return core


def _hash_model(base: Path) -> str:
    """Return a hash of a base model's configuration and weights."""
    return hash_files(sorted([base / "config.json", *base.glob("*.safetensors")]))


def _read_prompt(
    prompt: Sequence[int], tables: Sequence[Any], sampling: Sampling
) -> tuple[TokenLogprob, ...]:
    """Return the log-probabilities of a prompt's tokens; vLLM has None for the first."""
    pairs = zip(prompt[1:], tables[1:], strict=True)
    return tuple(_logprob(token, table, sampling.logprobs or 0) for token, table in pairs)


def _logprob(token: int, table: Any, count: int) -> TokenLogprob:
    best = sorted(((int(i), float(entry.logprob)) for i, entry in table.items()), key=lambda pair: -pair[1])
    return TokenLogprob(token, float(table[token].logprob), tuple(best[:count]))


def pick_rank(adapter: Path | None) -> int:
    """Return the LoRA rank to reserve: the adapter's, and at least 64 for later versions."""
    if adapter is None:
        return 64
    rank = _read_rank(adapter)
    if rank > RANKS[-1]:
        raise InputError(
            f"{adapter} has rank {rank}; vLLM supports up to {RANKS[-1]}",
            "lower finetune.rank in params.yaml, or set services.engine.kind: transformers",
        )
    return next(reserved for reserved in RANKS if reserved >= max(rank, 64))


def _check_rank(adapter: Path, reserved: int) -> None:
    """Raise InputError for an adapter that a running vLLM has no room for; loading it would end vLLM."""
    if (rank := _read_rank(adapter)) > reserved:
        raise InputError(
            f"{adapter} has rank {rank}, and the running vLLM reserved {reserved} when it started",
            f"lower finetune.rank in params.yaml to {reserved}; or make this version the champion and "
            "restart the service, as the champion's rank is what is reserved",
        )


def _read_rank(adapter: Path) -> int:
    """Return the largest rank of an adapter's layers."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return max(int(rank) for rank in (config["r"], *(config.get("rank_pattern") or {}).values()))


def _import_vllm() -> Any:
    """Return the names that we use of vLLM."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # no usage reports
    # A forked process cannot use CUDA once this one has, and this one has threads, whose locks a fork breaks.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    # FlashInfer's sampler is compiled when vLLM starts, with nvcc, which a driver does not bring.
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    try:
        from vllm import SamplingParams
        from vllm.config import StructuredOutputsConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.engine.async_llm_engine import AsyncLLMEngine
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
    except ImportError as error:
        raise InputError(
            f"the engine vllm is not installed ({error})",
            "pip install '.[gpu]', or use another engine (services.engine.kind in params.yaml)",
        ) from error
    return SimpleNamespace(
        SamplingParams=SamplingParams,
        AsyncEngineArgs=AsyncEngineArgs,
        AsyncLLMEngine=AsyncLLMEngine,
        LoRARequest=LoRARequest,
        RequestOutputKind=RequestOutputKind,
        StructuredOutputsConfig=StructuredOutputsConfig,
        StructuredOutputsParams=StructuredOutputsParams,
        EngineDeadError=EngineDeadError,
        EngineGenerateError=EngineGenerateError,
    )
