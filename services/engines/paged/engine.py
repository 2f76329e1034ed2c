"""The engine for a CPU that guesses ahead: a Llama on OpenVINO's runtime, scheduled here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.engines.grammar import Grammar, Grammars
from services.engines.paged.drafts import Drafts
from services.engines.paged.model import PagedModel
from services.engines.paged.sampling import Chooser
from services.engines.paged.scheduler import Answer, Scheduler
from services.engines.worker import Outcome, Request, Worker
from stages.common.chat import end_of_turn_ids

Example = tuple[Sequence[int], Sequence[int]]


@dataclass(slots=True)
class _State:
    grammar: Grammar | None
    answer: Answer | None = None


class PagedEngine(Worker):
    """Writes answers with a Llama on a CPU, several tokens a step where they can be guessed.

    Args:
        gguf: the merged model.
        tokenizer: the one of transformers; prompts come as its ids.
        examples: token ids of prompts and of their answers, to guess from; served answers are learnt besides.
        kv_cache_mib: memory for keys and values of all sequences, and of prompts' common beginnings.
        context_tokens: of prompt and answer together; None for what the model was made for.
        threads: of the computation; None leaves the number to OpenVINO.
        batch_tokens: computed in a step, at most. A long prompt is read in pieces of this size, and the
            others write between two pieces.
        precision: `auto` computes in what the CPU is fastest in, `float32` exactly.
        guess: False writes one token a step.

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
        guess: bool = True,
    ) -> None:
        end_ids = frozenset(end_of_turn_ids(tokenizer))
        drafts = Drafts() if guess else None
        with ThreadPoolExecutor(
            1
        ) as beside:  # the runtime compiles on its own threads; so nobody waits twice
            loading = beside.submit(
                PagedModel, gguf, cache_mib=kv_cache_mib, threads=threads or 0, precision=precision
            )
            if drafts is not None:
                for prompt, answer in examples:
                    drafts.learn(prompt, [*answer, min(end_ids)])
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
        self.scheduler = Scheduler(model, step_tokens=step_tokens, end_ids=end_ids, drafts=drafts)
        self._requests: dict[int, Request] = {}  # by id of their answer
        self._start()

    def _prepare(self, sampling: Any) -> _State:
        schema = sampling.json_schema
        return _State(None if schema is None else self._grammars.compile(schema))

    def _enter(self, request: Request) -> None:
        chooser = Chooser(request.sampling, request.state.grammar)
        answer = self.scheduler.add(request.prompt, len(request.prompt) + request.max_tokens, chooser)
        request.state.answer = answer
        self._requests[id(answer)] = request

    def _leave(self, request: Request) -> None:
        del self._requests[id(request.state.answer)]
        self.scheduler.remove(request.state.answer)

    def _advance(self, running: Sequence[Request]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for answer, step in self.scheduler.step():
            end = step.finish_reason is not None
            request = self._requests.pop(id(answer)) if end else self._requests[id(answer)]
            outcomes.append((request, step))
        return outcomes
