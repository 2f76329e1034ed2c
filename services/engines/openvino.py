"""The CPU engine where the graph of `paged` does not compile: OpenVINO GenAI over a GGUF file.

OpenVINO reads and compiles the GGUF when the server starts. Its pipeline has paged attention, prefix caching
and chunked prefill.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from services.engines.grammar import Grammars
from services.engines.openvino_grammar import check_keywords, check_size, write_tags
from services.engines.paged.model import computes_bfloat16
from services.engines.protocol import (
    EngineError,
    FinishReason,
    Sampling,
    Step,
    TokenLogprob,
    Unsupported,
)
from services.engines.worker import Request, StepResult, Worker
from stages.common.chat.template import end_of_turn_ids
from stages.common.errors import InputError

# Block size of OpenVINO's paged attention on a CPU; a test compares it with the pipeline's own.
BLOCK_TOKENS = 32


class OpenvinoEngine(Worker):
    """Generate with OpenVINO GenAI's continuous batching pipeline.

    Args:
        gguf: the merged model.
        config: the model's `config.json`, for the size of the key-value cache.
        tokenizer: of transformers.
        kv_cache_mib: memory for keys and values, of running sequences and the prefix cache.
        context_tokens: limit of prompt and answer together; None for the model's own.
        threads: None uses all cores.
        batch_tokens: token budget of a step. Longer prompts are prefilled in chunks, and other sequences
            generate in between.
        precision: `auto` computes in the CPU's fastest type, `float32` exactly.

    Raises:
        InputError: the wheel is missing, or the file cannot be read.
    """

    name = "openvino"

    def __init__(
        self,
        gguf: Path,
        config: Path,
        tokenizer: Any,
        *,
        max_running: int = 32,
        max_waiting: int = 256,
        kv_cache_mib: int = 1024,
        context_tokens: int | None = None,
        threads: int | None = None,
        batch_tokens: int = 256,
        precision: str = "auto",
    ) -> None:
        settings = json.loads(config.read_text(encoding="utf-8"))
        block = _block_bytes(settings, 4 if precision == "float32" else 2)
        length = settings["max_position_embeddings"]
        blocks = kv_cache_mib * 2**20 // block
        if blocks < 1:
            raise InputError(
                f"a key-value cache of {kv_cache_mib} MiB has no room for {BLOCK_TOKENS} tokens",
                "raise services.engine.kv_cache_mib in params.yaml",
            )
        super().__init__(
            # A single sequence must fit into the cache, or it could never finish.
            context_tokens=min(context_tokens or length, length, blocks * BLOCK_TOKENS),
            max_running=max_running,
            max_waiting=max_waiting,
            end_ids=end_of_turn_ids(tokenizer),
        )
        self._grammars = Grammars(tokenizer, settings["vocab_size"], min(self._end_ids))
        self._genai = _import_genai()
        self._pipeline = self._open(gguf, blocks, threads, batch_tokens, precision)
        self._numbers = iter(range(2**63))
        self._start()

    def _open(self, gguf: Path, blocks: int, threads: int | None, batch_tokens: int, precision: str) -> Any:
        import openvino

        scheduler = self._genai.SchedulerConfig()
        scheduler.num_kv_blocks = blocks
        scheduler.max_num_seqs = self.max_running
        scheduler.max_num_batched_tokens = max(batch_tokens, self.max_running)
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = True
        properties: dict[str, Any] = {"KV_CACHE_PRECISION": "f16"}
        if threads:
            properties["INFERENCE_NUM_THREADS"] = threads
        if not computes_bfloat16(openvino.Core()):
            properties["INFERENCE_PRECISION_HINT"] = "f32"
        if precision == "float32":
            properties |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        try:
            with _make_writable(gguf) as path:
                return self._genai.ContinuousBatchingPipeline(str(path), scheduler, "CPU", properties)
        except RuntimeError as error:
            raise InputError(
                f"OpenVINO cannot read {gguf}: {error}",
                "export it again (dvc repro export), or use another engine (services.engine.kind)",
            ) from error

    def _prepare(self, sampling: Sampling) -> Any:
        if sampling.prompt_logprobs:
            raise Unsupported("the openvino engine has no log-probabilities of prompts")
        if sampling.embeds_prompt:
            raise Unsupported("the openvino engine has no vectors of prompts; use paged or transformers")
        self._grammars.compile_for(sampling)
        tags = write_tags(sampling.calls) if sampling.grammar is not None else None
        if sampling.json_schema is not None:
            check_size(sampling.json_schema)
            check_keywords(json.loads(sampling.json_schema))
        config = self._config(sampling, tags)
        try:
            config.validate()
        except RuntimeError as error:
            raise EngineError(f"OpenVINO rejects the parameters: {error}") from error
        return config

    def _config(self, sampling: Sampling, tags: str | None) -> Any:
        config = self._genai.GenerationConfig()
        config.apply_chat_template = False
        config.max_new_tokens = sampling.max_tokens
        config.eos_token_id = min(self._end_ids)
        config.stop_token_ids = set(self._end_ids)
        config.frequency_penalty = sampling.frequency_penalty
        config.presence_penalty = sampling.presence_penalty
        config.do_sample = sampling.temperature > 0
        if config.do_sample:
            config.temperature = sampling.temperature
            config.top_p = sampling.top_p
            config.rng_seed = (
                int.from_bytes(os.urandom(4)) if sampling.seed is None else sampling.seed % 2**63
            )
        if sampling.logprobs is not None:
            config.logprobs = 1  # it reports the sampled token only, whatever the number
        if tags is not None:
            structured = self._genai.StructuredOutputConfig()
            structured.structural_tags_config = tags
            config.structured_output_config = structured
        elif sampling.json_schema is not None:
            structured = self._genai.StructuredOutputConfig()
            structured.json_schema = sampling.json_schema
            config.structured_output_config = structured
        elif sampling.choices:
            structured = self._genai.StructuredOutputConfig()
            structured.regex = "|".join(re.escape(choice) for choice in sampling.choices)
            config.structured_output_config = structured
        return config

    def _enter(self, request: Request) -> None:
        import numpy as np
        from openvino import Tensor

        config = request.state
        config.max_new_tokens = request.max_tokens
        ids = Tensor(np.array([request.prompt], dtype=np.int64))
        request.state = self._pipeline.add_request(next(self._numbers), ids, config)

    def _leave(self, request: Request) -> None:
        request.state.cancel()

    def _advance(self, running: Sequence[Request]) -> list[StepResult]:
        self._pipeline.step()
        results: list[StepResult] = []
        for request in running:
            handle = request.state
            if handle.can_read():
                results.append((request, self._read(request)))
            elif handle.get_status() == self._genai.GenerationStatus.IGNORED:
                results.append((request, EngineError("the key-value cache has no room for this answer")))
        return results

    def _read(self, request: Request) -> Step:
        ids: list[int] = []
        nats: list[float] = []
        reason: FinishReason | None = None
        handle = request.state
        while handle.can_read():
            for output in handle.read().values():
                ids += output.generated_ids
                nats += output.generated_log_probs
                reason = _REASONS[output.finish_reason.name]
        end: TokenLogprob | None = None
        if ids and ids[-1] in self._end_ids:
            if request.sampling.logprobs is not None and nats:
                end = TokenLogprob(ids[-1], nats[-1])
            ids, nats, reason = ids[:-1], nats[:-1], "stop"
        logprobs: tuple[TokenLogprob, ...] = ()
        if request.sampling.logprobs is not None:
            logprobs = tuple(map(TokenLogprob, ids, nats))
        return Step(tuple(ids), reason, logprobs, end=end)

    def _end(self, left: Sequence[Request]) -> None:
        with contextlib.suppress(RuntimeError):  # a failed pipeline may be in any state
            for request in left:
                self._leave(request)
            self._pipeline.step()
        del self._pipeline


_REASONS: dict[str, FinishReason | None] = {"NONE": None, "STOP": "stop", "LENGTH": "length"}


@contextlib.contextmanager
def _make_writable(gguf: Path) -> Iterator[Path]:
    """Yield a writable copy of a read-only file: OpenVINO opens it for writing, though it writes nothing."""
    if os.access(gguf, os.W_OK):
        yield gguf
        return
    with TemporaryDirectory() as folder:
        yield Path(shutil.copyfile(gguf, Path(folder) / gguf.name))


def _block_bytes(settings: dict[str, Any], width: int) -> int:
    """Return the size of a block of keys and values in all layers, in bytes; a number has `width` bytes."""
    heads = settings.get("num_key_value_heads") or settings["num_attention_heads"]
    size = settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"]
    return int(settings["num_hidden_layers"] * 2 * heads * size * BLOCK_TOKENS * width)


def _import_genai() -> Any:
    try:
        import openvino_genai
    except ImportError as error:
        raise InputError(
            f"the engine openvino is not installed ({error})",
            "pip install '.[serve]', or use another engine (services.engine.kind in params.yaml)",
        ) from error
    return openvino_genai
