"""The CPU engine with speculative decoding: a decoder on OpenVINO's runtime, scheduled here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.engines.grammar import Grammar, Grammars
from services.engines.paged.model import PagedModel
from services.engines.paged.ngram_drafter import NgramDrafter
from services.engines.paged.scheduler import ActiveSequence, Scheduler
from services.engines.sampling import Sampler
from services.engines.worker import Request, StepResult, Worker, make_failure
from stages.common.chat.template import end_of_turn_ids

Example = tuple[Sequence[int], Sequence[int]]


@dataclass(slots=True)
class _State:
    grammar: Grammar | None
    sequence: ActiveSequence | None = None


class PagedEngine(Worker):
    """Generate with a Llama, Mistral or Qwen on a CPU, with continuous batching and speculative decoding.

    Args:
        gguf: the merged model.
        tokenizer: of transformers.
        examples: token ids of prompts and their answers, for the drafter; it also learns from served answers.
        kv_cache_mib: memory for keys and values, of running sequences and the prefix cache.
        context_tokens: limit of prompt and answer together; None for the model's own.
        threads: None lets OpenVINO choose.
        batch_tokens: token budget of a step. Longer prompts are prefilled in chunks, and other sequences
            generate in between.
        precision: `auto` computes in the CPU's fastest type, `float32` exactly.
        speculate: False decodes one token per step.

    Raises:
        InputError: the file cannot be read.
        EngineError: the file is of another architecture, or this OpenVINO does not take the graph.
    """

    name = "paged"

    def __init__(
        self,
        gguf: Path,
        tokenizer: Any,
        *,
        examples: Iterable[Example] = (),
        max_running: int = 32,
        max_waiting: int = 256,
        kv_cache_mib: int = 1024,
        context_tokens: int | None = None,
        threads: int | None = None,
        batch_tokens: int = 256,
        precision: str = "auto",
        speculate: bool = True,
    ) -> None:
        end_ids = frozenset(end_of_turn_ids(tokenizer))
        drafter = NgramDrafter() if speculate else None
        # The runtime compiles on its own threads, while the drafter counts here.
        with ThreadPoolExecutor(1) as executor:
            loading = executor.submit(
                PagedModel, gguf, cache_mib=kv_cache_mib, threads=threads or 0, precision=precision
            )
            if drafter is not None:
                for prompt, answer in examples:
                    drafter.learn(prompt, [*answer, min(end_ids)])
            model = loading.result()
        super().__init__(
            # A sequence must fit into the cache alone, or it could never end.
            context_tokens=min(
                context_tokens or model.shape.context, model.shape.context, model.blocks * model.block_tokens
            ),
            max_running=max_running,
            max_waiting=max_waiting,
            end_ids=tuple(end_ids),
        )
        self._grammars = Grammars(tokenizer, model.shape.vocabulary, min(end_ids))
        step_tokens = max(batch_tokens, max_running)
        model.warm_up(step_tokens)
        self.scheduler = Scheduler(model, step_tokens=step_tokens, end_ids=end_ids, drafter=drafter)
        self._requests: dict[int, Request] = {}  # by id of their sequence
        self._start()

    def _prepare(self, sampling: Any) -> _State:
        return _State(self._grammars.compile_for(sampling))

    def _enter(self, request: Request) -> None:
        sampler = Sampler(request.sampling, sorted(self._end_ids), request.state.grammar)
        limit = len(request.prompt) + request.max_tokens
        request.state.sequence = self.scheduler.add(request.prompt, limit, sampler)
        self._requests[id(request.state.sequence)] = request

    def _leave(self, request: Request) -> None:
        del self._requests[id(request.state.sequence)]
        self.scheduler.remove(request.state.sequence)

    def _advance(self, running: Sequence[Request]) -> list[StepResult]:
        results: list[StepResult] = []
        for sequence, step in self.scheduler.step():
            item = make_failure(step) if isinstance(step, Exception) else step
            end = isinstance(item, Exception) or item.finish_reason is not None
            request = self._requests.pop(id(sequence)) if end else self._requests[id(sequence)]
            results.append((request, item))
        return results
