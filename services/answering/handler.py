"""Handle a generation request: guard, model, engine, text, guard, event."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace

from services import errors
from services.answering import deadline
from services.answering.checking import check_calls, check_tools
from services.answering.failures import convert_failure
from services.answering.held_calls import hold_calls, make_reader, restrict_text
from services.answering.held_tokens import HeldTokens
from services.answering.prompts import apply_guard, encode_prompt, read_texts
from services.answering.request import Delta, Echo, GenerationRequest, Usage, make_request_id
from services.answering.state import GenerationState, build_exchange
from services.background import BackgroundTasks
from services.engines.calls.reading import Piece, join_pieces
from services.engines.detokenizer import IncrementalDetokenizer
from services.engines.protocol import (
    ContextOverflow,
    EngineError,
    QueueFull,
    Sampling,
    SchemaUnsupported,
    Step,
    Unsupported,
)
from services.errors import ApiError
from services.events import CLIENT_GONE, EventStore, StoreUnavailable
from services.guard.policy import buffers_output, check_answer
from services.keys.access import Access
from services.metrics import get_metrics
from services.model_pool import LoadedModel, ModelPool, Route
from services.schemas.trials import SchemaTrials
from stages.common.chat.calls import find_shown_ids
from stages.common.params.services import Services

MAX_SHADOWS = 8  # shadow answers at the same time; more are skipped and counted

logger = logging.getLogger("services.answering")


@dataclass(slots=True)
class ChatHandler:
    """Answers requests with the models of the pool, and stores every exchange.

    Args:
        store: an answer is complete only once its event is stored here.
        access: rates and quotas.
        schemas: tries the schemas of requests.
    """

    settings: Services
    pool: ModelPool
    store: EventStore
    access: Access
    schemas: SchemaTrials
    _background: BackgroundTasks = field(default_factory=BackgroundTasks)
    _shadows: int = 0

    async def generate(self, request: GenerationRequest, route: Route) -> AsyncGenerator[Delta]:
        """Generate the answer of the routed model; yields the last delta once its event is stored.

        Raises:
            ApiError: before the first delta if the request is rejected; later only if the engine or the
                store fails, or the guard rejects the answer.
        """
        self._check_store()
        state = GenerationState(route)
        with route.model.in_use():
            try:
                async for delta in self._generate_within_quota(request, state):
                    if delta.finish_reason is not None and route.shadow is not None:
                        self._start_shadow(request, route.shadow, state.answer)
                    yield delta
            except ApiError as error:
                self._record_failure(request, state, error.status, error.reason or error.code)
                raise
            except (asyncio.CancelledError, GeneratorExit):
                # A stored answer was complete: the client only left before the end of the stream.
                if not state.stored:
                    self._record_end(request, state)
                raise

    async def settle(self) -> None:
        """Wait for events and shadow answers still in progress, before the store closes."""
        await self._background.settle()

    def find_problem(self) -> str | None:
        """Return why no request can be answered, or None."""
        return self.pool.find_problem() or self._store_problem()

    async def _generate_within_quota(
        self, request: GenerationRequest, state: GenerationState
    ) -> AsyncIterator[Delta]:
        guard = self.settings.guard
        texts = read_texts(request, state, guard.max_prompt_tokens)
        await self._check_requested_schema(request, state.model)
        await check_tools(request, state.model, self.schemas, self.settings.answers.constrained_decoding)
        prompt = await encode_prompt(texts, request, state, guard)
        reserved = len(prompt) + request.sampling.max_tokens
        self.access.reserve(request.caller, reserved)
        try:
            async for delta in self._generate_and_store(request, state, prompt):
                yield delta
        finally:
            self.access.settle(request.caller, reserved, state.prompt_tokens + state.completion_tokens)

    async def _generate_and_store(
        self, request: GenerationRequest, state: GenerationState, prompt: list[int]
    ) -> AsyncIterator[Delta]:
        buffered = buffers_output(self.settings.guard)
        echoed = not request.echo
        pieces: list[Piece] = []
        async for step, piece in self._decode(prompt, request, state):
            if not echoed:
                yield Delta("", echo=_make_echo(request, prompt, step, state.model))
                echoed = True
            if buffered:
                pieces.append(piece)
            elif state.finish_reason is None and (piece or step.logprobs):
                yield Delta(piece.text, step.logprobs, reasoning=piece.reasoning, calls=piece.calls)
        last, logprobs, end = (
            (join_pieces(pieces), (), None) if buffered else (piece, step.logprobs, step.end)
        )
        await self._check_answer(request, state)
        state.stored = True  # even if the client leaves before it is written
        try:
            await self._store_exchange(request, state, 200, None)
        except StoreUnavailable:
            raise errors.store_unavailable() from None
        _count_request(request, state, 200)
        _observe_answer(state)
        usage = Usage(state.prompt_tokens, state.completion_tokens)
        yield Delta(
            last.text,
            logprobs,
            state.finish_reason,
            usage,
            state.valid,
            state.mean_logprob,
            end=end,
            reasoning=last.reasoning,
            calls=last.calls,
        )

    def _store_problem(self) -> str | None:
        return self.store.find_problem() if self.settings.events.on_failure == "refuse" else None

    def _check_store(self) -> None:
        if (problem := self._store_problem()) is not None:
            logger.error("the event store cannot be written: %s", problem)
            raise errors.store_unavailable()

    async def _check_requested_schema(self, request: GenerationRequest, model: LoadedModel) -> None:
        """Reject a schema that is invalid, unsupported or too costly, before decoding starts.

        Raises:
            ApiError: invalid_value; or overloaded, if too many schemas wait to be checked.
        """
        if (schema := request.sampling.json_schema) is None:
            return
        try:
            await self.schemas.check_schema(schema, model.files.tag, model.tokenizer)
        except SchemaUnsupported as error:
            raise errors.invalid_value(request.schema_param, str(error)) from None
        except QueueFull:
            raise errors.overloaded(retry_after_s=1.0) from None

    async def _check_answer(self, request: GenerationRequest, state: GenerationState) -> None:
        if request.sampling.max_tokens == 0:  # there is none
            return
        guard = self.settings.guard
        requested = request.sampling.json_schema
        decision = None
        schema = requested or state.model.answer_schema
        is_json = requested is not None or state.model.task.answers_are_json
        if state.reader is not None and state.reader.has_calls:
            schema, is_json = "{}", True
            decision = (
                await check_calls(request, state.answer, self.schemas) if guard.schema_ != "off" else None
            )
        elif requested is not None and guard.schema_ != "off":
            decision = await self.schemas.check_answer(state.answer, requested)
        apply_guard(state, check_answer(state.answer, schema, is_json, guard, decision, state.thoughts), None)

    async def _decode(
        self, prompt: list[int], request: GenerationRequest, state: GenerationState
    ) -> AsyncIterator[tuple[Step, Piece]]:
        """Yield the engine's steps with what they say; sets the finish reason with the last."""
        tokenizer = state.model.tokenizer
        has_calls = request.allowed is not None and bool(request.allowed.callable_tools)
        shown = frozenset() if request.raw is not None else find_shown_ids(tokenizer, has_calls)
        stops = () if has_calls else request.stops  # else the reader's, which end no call
        text, held = IncrementalDetokenizer(tokenizer, stops, shown), HeldTokens()
        try:
            sampling = self._resolve_sampling(request, state.model)
            reader = state.reader = make_reader(request, sampling, tokenizer)
            async with aclosing(state.model.engine.generate(prompt, sampling)) as steps:  # type: ignore[type-var]
                async for step in steps:
                    if request.sampling.max_tokens == 0:
                        step = Step((), "length", prompt_logprobs=step.prompt_logprobs)
                    new = text.push(step.token_ids)
                    if step.finish_reason:
                        new += text.finish()
                    step = held.release(step, text.count_released())
                    if text.stopped or not request.echo:
                        step = replace(step, end=None)
                    reason = "stop" if text.stopped else step.finish_reason
                    piece = reader.push(new, is_last=reason is not None)
                    reason = "stop" if reader.stopped else reason
                    state.add(step, new, piece.reasoning)
                    state.finish_reason = "tool_calls" if reason == "stop" and reader.has_calls else reason
                    yield (
                        step
                        if request.sampling.logprobs is not None
                        else replace(step, logprobs=(), end=None),
                        piece,
                    )
                    if state.finish_reason:
                        return
        except SchemaUnsupported as error:
            param = "tools" if request.tools else request.schema_param
            raise errors.invalid_value(param, str(error)) from None
        except Unsupported as error:
            raise errors.unsupported_parameter("echo", f"with logprobs is not supported: {error}") from None
        except ContextOverflow:
            limit = state.model.engine.context_tokens
            raise errors.context_length_exceeded(len(prompt), limit, request.prompt_param) from None
        except EngineError as error:
            raise convert_failure(error, state.model, request.request_id) from None
        raise errors.engine_failed(request.request_id)

    def _resolve_sampling(self, request: GenerationRequest, model: LoadedModel) -> Sampling:
        """Add log-probabilities, for monitoring, and the schema, choices or grammar of constrained decoding.

        Raises:
            SchemaUnsupported: the calls cannot be held.
        """
        wanted = request.sampling
        sampling = replace(wanted, logprobs=wanted.logprobs or 0, max_tokens=max(1, wanted.max_tokens))
        is_constrained = self.settings.answers.constrained_decoding
        grammar = hold_calls(request, model, is_constrained)
        if grammar is not None:
            return replace(sampling, grammar=grammar.text, calls=grammar.form, json_schema=None)
        schema, choices = restrict_text(wanted.json_schema, model, is_constrained)
        return replace(sampling, json_schema=schema, choices=choices)

    async def _store_exchange(
        self, request: GenerationRequest, state: GenerationState, status: int, reason: str | None
    ) -> None:
        """Store the event.

        Raises:
            StoreUnavailable: it could not be stored, and `services.events.on_failure` is `refuse`.
        """
        event = build_exchange(request, state, status, reason, self.settings.events.redact)
        try:
            await self.store.record(event)
        except StoreUnavailable as error:
            logger.error("%s is not stored: %s", request.request_id, error)
            lost = self.settings.events.on_failure == "drop"
            get_metrics().events.labels("lost" if lost else "refused").inc()
            if not lost:
                raise
        else:
            get_metrics().events.labels("stored").inc()

    def _record_failure(
        self, request: GenerationRequest, state: GenerationState, status: int, reason: str
    ) -> None:
        async def store() -> None:
            with suppress(StoreUnavailable):  # logged and counted already
                await self._store_exchange(request, state, status, reason)

        _count_request(request, state, status)
        self._background.start(store())

    def _record_end(self, request: GenerationRequest, state: GenerationState) -> None:
        """Store a request that was cancelled: it took too long, or its client has left."""
        if deadline.has_passed():
            error = errors.timed_out(self.settings.request_timeout_s)
            self._record_failure(request, state, error.status, error.code)
        else:
            state.finish_reason = "cancelled"
            self._record_failure(request, state, CLIENT_GONE, "client_gone")

    def _start_shadow(self, request: GenerationRequest, shadow: LoadedModel, shown: str) -> None:
        """Send the request to the challenger too, unseen; skipped above MAX_SHADOWS."""
        if self._shadows >= MAX_SHADOWS:
            get_metrics().shadows.labels("skipped", shadow.files.version).inc()
            return
        self._shadows += 1
        self._background.start(self._run_shadow(request, shadow, shown))

    async def _run_shadow(self, request: GenerationRequest, shadow: LoadedModel, shown: str) -> None:
        own = replace(
            request,
            request_id=make_request_id(),
            received_at=time.time(),
            shadow_of=request.request_id,
            sampling=replace(request.sampling, prompt_logprobs=False),
        )
        state = GenerationState(Route(shadow, "shadow"))
        try:
            with shadow.in_use(), suppress(StoreUnavailable):
                guard = self.settings.guard
                texts = read_texts(own, state, guard.max_prompt_tokens)
                prompt = await encode_prompt(texts, own, state, guard)
                async for _ in self._decode(prompt, own, state):
                    pass
                await self._check_answer(own, state)
                await self._store_exchange(own, state, 200, None)
                same = "yes" if state.answer == shown else "no"
                get_metrics().shadows.labels(same, state.version).inc()
        except ApiError as error:
            logger.info("%s: the shadow of %s failed: %s", own.request_id, request.request_id, error)
        finally:
            self._shadows -= 1


def _make_echo(request: GenerationRequest, prompt: list[int], step: Step, model: LoadedModel) -> Echo:
    text = request.raw if isinstance(request.raw, str) else model.tokenizer.decode(prompt)
    logprobs = step.prompt_logprobs if request.sampling.prompt_logprobs else None
    return Echo(text, tuple(prompt), logprobs)


def _count_request(request: GenerationRequest, state: GenerationState, status: int) -> None:
    get_metrics().requests.labels(request.route, str(status), state.version).inc()


def _observe_answer(state: GenerationState) -> None:
    metrics, version = get_metrics(), state.version
    total_s = time.monotonic() - state.started
    first_s = state.first_token_s or total_s
    metrics.queue_s.labels(version).observe(state.queue_s)
    metrics.first_token_s.labels(version).observe(first_s)
    metrics.total_s.labels(version).observe(total_s)
    metrics.tokens.labels("in", version).inc(state.prompt_tokens)
    metrics.tokens.labels("out", version).inc(state.completion_tokens)
    if total_s > first_s and state.completion_tokens > 1:
        metrics.tokens_per_s.labels(version).observe((state.completion_tokens - 1) / (total_s - first_s))
