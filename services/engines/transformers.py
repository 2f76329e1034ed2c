"""The engine that runs everywhere, and the reference for the others: transformers.

The continuous batching of transformers has one sampler for all requests, so no seed, schema or
log-probabilities per request. So batching is implemented here: sequences are decoded together, and join or
leave at any step.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.engines.grammar import Grammars
from services.engines.protocol import (
    EngineError,
    FinishReason,
    Sampling,
    SchemaUnsupported,
    Step,
    TokenLogprob,
    Unsupported,
)
from services.engines.sampling import Sampler
from services.engines.worker import Request, StepResult, Worker, make_failure
from stages.common.chat.template import encode_text, end_of_turn_ids
from stages.common.errors import InputError
from stages.common.model.label_head import find_labels
from stages.common.model.loading import load_base, load_tuned, pick_device, pick_dtype, read_position_limit
from stages.common.model.virtual_tokens import begin_cache, count_virtual_tokens

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class _State:
    """State of an answer; it has a cache of its own until its prompt is prefilled."""

    sampler: Sampler
    cache: Any = None
    prefilled: int = 0
    generated: int = 0
    last: int = -1
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    hidden_sum: Any = None  # of the prompt's tokens so far


class TransformersEngine(Worker):
    """Generate with transformers, on a GPU or a CPU.

    Memory grows with `max_running` times the context, since all sequences are padded to the longest.

    Args:
        base: folder of the base model.
        adapter: folder of the adapter, which is merged or has virtual tokens; None for the base model alone.
        device: `auto`, `cpu`, `cuda` or `mps`.
        precision: `auto`, `bfloat16` or `float32`; see `stages.common.model.loading.pick_dtype`.
        context_tokens: limit of prompt and answer together; None for the model's own.
        threads: None lets torch choose.
        batch_tokens: prefill chunk; other sequences generate a token between two chunks.

    Raises:
        InputError: a folder has no model or no adapter, or neither model nor settings limit the context.
    """

    name = "transformers"

    def __init__(
        self,
        base: Path,
        adapter: Path | None,
        tokenizer: Any,
        *,
        device: str = "auto",
        precision: str = "auto",
        max_running: int = 8,
        max_waiting: int = 256,
        context_tokens: int | None = None,
        threads: int | None = None,
        batch_tokens: int = 256,
    ) -> None:
        import torch

        if threads:
            torch.set_num_threads(threads)
        self._device = pick_device() if device == "auto" else torch.device(device)
        dtype = pick_dtype(self._device, precision)
        if adapter is None:
            self._model = load_base(base, dtype, self._device)
        else:
            self._model = load_tuned(base, adapter, dtype, self._device)
        self._virtual = count_virtual_tokens(self._model)
        with torch.inference_mode():
            self._beginning = begin_cache(self._model, 1)
        positions = read_position_limit(self._model.config, self._virtual)
        limits = [limit for limit in (context_tokens, positions) if limit]
        if not limits:
            raise InputError(
                f"the model in {base} has no limit of its context", "set services.engine.context_tokens"
            )
        super().__init__(
            context_tokens=min(limits),
            max_running=max_running,
            max_waiting=max_waiting,
            end_ids=end_of_turn_ids(tokenizer),
        )
        self._grammars = Grammars(
            tokenizer, self._model.config.get_text_config().vocab_size, min(self._end_ids)
        )
        self._batch_tokens = batch_tokens
        self._prefilling: deque[Request] = deque()
        self._batch = _Batch()
        self._start()

    def _prepare(self, sampling: Sampling) -> _State:
        grammar = self._grammars.compile_for(sampling)
        return _State(Sampler(sampling, sorted(self._end_ids), grammar))

    def _enter(self, request: Request) -> None:
        self._prefilling.append(request)

    def _leave(self, request: Request) -> None:
        if request in self._prefilling:
            self._prefilling.remove(request)
        else:
            self._batch.keep([other for other in self._batch.requests if other is not request])

    def _advance(self, running: Sequence[Request]) -> list[StepResult]:
        import torch

        with torch.inference_mode():
            results = self._decode()
            if self._prefilling:
                results += self._prefill_chunk(self._prefilling[0])
        return results

    def _decode(self) -> list[StepResult]:
        """Generate one token of each sequence whose prompt is prefilled."""
        if not self._batch.requests:
            return []
        logits = self._batch.step(self._model, self._device)
        results = self._sample(self._batch.requests, logits)
        ended = {id(request) for request, item in results if _is_end(item)}
        if ended:
            self._batch.keep([request for request in self._batch.requests if id(request) not in ended])
        return results

    def _prefill_chunk(self, request: Request) -> list[StepResult]:
        """Prefill the next chunk of a prompt; the last one yields the first token."""
        import torch
        from transformers import DynamicCache

        state: _State = request.state
        chunk = request.prompt[state.prefilled : state.prefilled + self._batch_tokens]
        state.cache = state.cache or copy.deepcopy(self._beginning) or DynamicCache()
        scored, embeds = state.sampler.scores_prompt, state.sampler.embeds_prompt
        ids = torch.tensor([chunk], device=self._device)
        first = self._virtual + state.prefilled
        positions = torch.arange(first, first + len(chunk), device=self._device)[None]
        out = self._model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=state.cache,
            use_cache=True,
            output_hidden_states=embeds,
            logits_to_keep=torch.arange(0 if scored else len(chunk) - 1, len(chunk), device=self._device),
        )
        if scored:
            following = request.prompt[state.prefilled + 1 : state.prefilled + len(chunk) + 1]
            rows = out.logits[0, : len(following)].float().cpu().numpy()
            state.prompt_logprobs += map(state.sampler.score, rows, following)
        if embeds:
            new = out.hidden_states[-1][0].double().sum(dim=0).cpu()
            state.hidden_sum = new if state.hidden_sum is None else state.hidden_sum + new
        state.prefilled += len(chunk)
        if state.prefilled < len(request.prompt):
            return []
        self._prefilling.popleft()
        results = self._sample([request], out.logits[:, -1])
        step = results[0][1]
        if scored and isinstance(step, Step):
            results = [(request, replace(step, prompt_logprobs=tuple(state.prompt_logprobs)))]
        if embeds and isinstance(step, Step):
            vector = tuple((state.hidden_sum / len(request.prompt)).tolist())
            results = [(request, replace(step, embedding=vector))]
        if not _is_end(results[0][1]):
            self._batch.join(request, state.cache)
        state.cache = None
        return results

    def _sample(self, requests: Sequence[Request], logits: torch.Tensor) -> list[StepResult]:
        likeliest = logits.argmax(dim=-1).tolist()
        rows = None
        results: list[StepResult] = []
        for place, request in enumerate(requests):
            if not request.state.sampler.needs_logits:
                results.append((request, self._make_step(request, likeliest[place], None)))
                continue
            rows = logits.float().cpu().numpy() if rows is None else rows
            try:
                token, logprob = request.state.sampler.sample(rows[place], likeliest[place])
            except Exception as error:  # of its sampler or grammar, so the others go on
                results.append((request, make_failure(error)))
            else:
                results.append((request, self._make_step(request, token, logprob)))
        return results

    def _make_step(self, request: Request, token: int, logprob: TokenLogprob | None) -> Step:
        if token in self._end_ids:
            return Step((), "stop", end=logprob)
        state: _State = request.state
        state.last = token
        state.generated += 1
        reason: FinishReason | None = "length" if state.generated >= request.max_tokens else None
        return Step((token,), reason, () if logprob is None else (logprob,))

    def _end(self, left: Sequence[Request]) -> None:
        self._batch = _Batch()
        self._prefilling.clear()
        del self._model


@dataclass(slots=True)
class _LabelState(_State):
    """State of an answer that is one of the labels.

    Attributes:
        shares: log-probability of each label; None until the prompt is read.
        written: tokens of the answer so far.
    """

    shares: Any = None
    written: list[int] = field(default_factory=list)


class LabelEngine(TransformersEngine):
    """Answer with the labels of a model that has a head over them (method head).

    The prompt is read once; the tokens of a label follow from its probability alone. A token has the
    probability of all labels that go on with it, so those of an answer multiply to its label's. Greedy is the
    likeliest label, also where others together have a likelier first token.
    """

    def __init__(self, base: Path, adapter: Path | None, tokenizer: Any, **settings: Any) -> None:
        super().__init__(base, adapter, tokenizer, **settings)
        self._batch = _Labels()
        self._words = int(self._model.config.get_text_config().vocab_size)
        self._labels = find_labels(self._model)
        texts = (encode_text(tokenizer, label) for label in self._labels)
        self._answers = [[*tokens, min(self._end_ids)] for tokens in texts]

    def _prepare(self, sampling: Sampling) -> _LabelState:
        if sampling.prompt_logprobs:
            raise Unsupported("a model that answers with labels has no log-probabilities of a prompt")
        state = super()._prepare(sampling)
        return _LabelState(state.sampler)

    def _sample(self, requests: Sequence[Request], logits: Any) -> list[StepResult]:
        results: list[StepResult] = []
        for request in requests:
            state: _LabelState = request.state
            if state.shares is None:
                state.shares = logits[0].float().log_softmax(dim=-1).cpu().numpy()
            try:
                token, logprob = self._choose(request, state)
            except Exception as error:  # of its sampler or grammar, so the others go on
                results.append((request, make_failure(error)))
                continue
            state.written.append(token)
            results.append((request, self._make_step(request, token, logprob)))
        return results

    def _choose(self, request: Request, state: _LabelState) -> tuple[int, TokenLogprob | None]:
        import numpy as np

        place = len(state.written)
        choices = request.sampling.choices
        possible = [
            (answer[place], share, not choices or label in choices)
            for label, answer, share in zip(self._labels, self._answers, state.shares, strict=True)
            if answer[:place] == state.written
        ]
        best, wanted, summed = (np.full(self._words, -np.inf, np.float32) for _ in range(3))
        for token, share, is_wanted in possible:
            summed[token] = np.logaddexp(summed[token], share)
            if is_wanted:
                best[token] = max(best[token], share)
                wanted[token] = np.logaddexp(wanted[token], share)
        is_greedy = request.sampling.temperature <= 0
        try:
            token, logprob = state.sampler.sample(best if is_greedy else wanted, int(best.argmax()))
        except EngineError:
            raise SchemaUnsupported(
                "the schema allows none of the labels that the model answers with"
            ) from None
        return token, state.sampler.score(summed, token) if logprob is not None else None


def _is_end(item: Step | Exception) -> bool:
    return isinstance(item, Exception) or item.finish_reason is not None


class _Batch:
    """Sequences that are decoded together, their keys and values padded on the left to one length."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._cache: Any = None
        self._mask: Any = None  # 1 where the cache has a token; shape (sequences, cached)

    def step(self, model: Any, device: torch.device) -> torch.Tensor:
        """Feed the last token of each sequence; return the next logits, shape (sequences, vocabulary)."""
        import torch

        tokens = torch.tensor([[request.state.last] for request in self.requests], device=device)
        positions = self._mask.sum(dim=1, keepdim=True)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        out = model(
            input_ids=tokens,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        return out.logits[:, -1]  # type: ignore[no-any-return]

    def join(self, request: Request, cache: Any) -> None:
        """Add a sequence whose prompt is prefilled."""
        import torch

        mask = torch.ones(1, cache.get_seq_length(), dtype=torch.long, device=cache.layers[0].keys.device)
        if self.requests:
            width = max(self._mask.shape[1], mask.shape[1])
            self._mask = torch.cat([_pad(self._mask, width, 1), _pad(mask, width, 1)])
            for mine, new in zip(self._cache.layers, cache.layers, strict=True):
                mine.keys = torch.cat([_pad(mine.keys, width, 2), _pad(new.keys, width, 2)])
                mine.values = torch.cat([_pad(mine.values, width, 2), _pad(new.values, width, 2)])
        else:
            self._mask, self._cache = mask, cache
        self.requests.append(request)

    def keep(self, requests: list[Request]) -> None:
        """Keep only these sequences, and remove padding that none of them needs."""
        import torch

        if not requests:
            self.requests, self._cache, self._mask = [], None, None
            return
        rows = torch.tensor([self.requests.index(r) for r in requests], device=self._mask.device)
        self._mask = self._mask[rows]
        unused = int(self._mask.any(dim=0).int().argmax())
        self._mask = self._mask[:, unused:]
        for layer in self._cache.layers:
            layer.keys = layer.keys[rows, :, unused:]
            layer.values = layer.values[rows, :, unused:]
        self.requests = requests


class _Labels(_Batch):
    """Answers whose prompt is read and that need no model any more; as `_Batch`, without a cache."""

    def step(self, model: Any, device: torch.device) -> torch.Tensor:
        """Compute nothing."""
        import torch

        return torch.empty(0)

    def join(self, request: Request, cache: Any) -> None:
        """Add an answer."""
        self.requests.append(request)

    def keep(self, requests: list[Request]) -> None:
        """Keep only these answers."""
        self.requests = requests


def _pad(tensor: torch.Tensor, width: int, dim: int) -> torch.Tensor:
    """Pad a tensor with leading zeros to `width` in one dimension."""
    import torch

    missing = width - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor.new_zeros(shape), tensor], dim=dim)
