"""One request from end to end: guard, version, engine, text, guard, event."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from services import errors
from services.engines.detokenizer import AnswerText
from services.engines.protocol import (
    ContextOverflow,
    EngineError,
    QueueFull,
    Sampling,
    SchemaUnsupported,
    Step,
    TokenLogprob,
)
from services.errors import ApiError
from services.events import EventStore, Exchange, StoreUnavailable
from services.events.redaction import pseudonym
from services.guard import checks
from services.keys.access import Access, Caller
from services.metrics import get_metrics
from services.model_pool import Choice, Fleet, Served
from stages.common.chat import encode_prompt
from stages.common.errors import InputError
from stages.common.params.services import Services
from stages.common.records import Message

# No token of a known vocabulary stands for more characters than this: longer prompts cannot fit, and
# need not be tokenised to know it.
MAX_CHARS_PER_TOKEN = 32
MAX_SHADOWS = 8  # answers written unseen at the same time; more are left out, and counted
CLIENT_GONE = 499  # nginx's status for a client that closed the connection

logger = logging.getLogger("services.answering")


@dataclass(frozen=True, slots=True)
class Question:
    """What a request asks, whichever route it came by.

    Attributes:
        messages: the conversation; empty for a raw prompt.
        raw: text or token ids to continue as they are; None for a conversation.
        caller: who asks, as the keys know them.
        user, session: who asks and in what conversation, as the caller says.
    """

    request_id: str
    route: str
    messages: tuple[Message, ...]
    sampling: Sampling
    caller: Caller
    raw: str | tuple[int, ...] | None = None
    stops: tuple[str, ...] = ()
    model: str | None = None
    user: str | None = None
    session: str | None = None
    shadow_of: str | None = None
    received_at: float = field(default_factory=time.time)

    @property
    def asker(self) -> str:
        """Whom a trial takes or leaves, always alike: the user, else the session, else the caller."""
        return self.user or self.session or self.caller.client

    def said(self) -> list[dict[str, str]]:
        """Return what the asker sent, as the guard reads it."""
        if isinstance(self.raw, str):
            return [{"role": "user", "content": self.raw}]
        return [{"role": message.role, "content": message.content} for message in self.messages]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of an answer; the last one has a finish reason and the usage."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    usage: Usage | None = None
    valid: bool | None = None
    mean_logprob: float | None = None


@dataclass(slots=True)
class Progress:
    """What is known of an answer while it is written."""

    choice: Choice
    started: float = field(default_factory=time.monotonic)
    verdicts: dict[str, checks.Verdict] = field(default_factory=dict)
    pieces: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    logprob_sum: float = 0.0
    logprob_count: int = 0
    first_token_s: float | None = None
    queue_s: float = 0.0
    finish_reason: str | None = None
    valid: bool | None = None
    kept: bool = False  # its event is stored

    @property
    def served(self) -> Served:
        """The version that answers."""
        return self.choice.served

    @property
    def version(self) -> str:
        """Its content hash."""
        return self.served.files.version

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self.pieces)

    @property
    def mean_logprob(self) -> float | None:
        """Mean log-probability of the tokens so far, in nats; None without any."""
        return self.logprob_sum / self.logprob_count if self.logprob_count else None

    def take(self, step: Step, text: str) -> None:
        """Add what the engine wrote."""
        if self.first_token_s is None and (step.token_ids or step.finish_reason):
            self.first_token_s = time.monotonic() - self.started
        self.queue_s += step.queue_s
        self.completion_tokens += len(step.token_ids)
        self.logprob_sum += sum(entry.logprob for entry in step.logprobs)
        self.logprob_count += len(step.logprobs)
        if text:
            self.pieces.append(text)


def new_request_id() -> str:
    """Return an id for a request, unique for all time."""
    return f"req_{uuid.uuid4().hex}"


@dataclass(slots=True)
class Answerer:
    """Answers questions with what the fleet serves, and keeps every one of them.

    Args:
        fleet: the versions in memory.
        store: where exchanges go; an answer is complete only when its event is there.
        access: rates and quotas.
    """

    settings: Services
    fleet: Fleet
    store: EventStore
    access: Access
    _background: set[asyncio.Task[None]] = field(default_factory=set)
    _shadows: int = 0

    async def answer(self, question: Question, choice: Choice) -> AsyncGenerator[Part]:
        """Write the chosen version's answer, piece by piece; the last comes when its event is stored.

        Raises:
            ApiError: before the first piece for what can be known then; later only if the engine
                or the store breaks, or the guard refuses the answer.
        """
        self._check_store()
        progress = Progress(choice)
        with choice.served.in_use():
            try:
                async for part in self._parts(question, progress):
                    if part.finish_reason is not None and choice.shadow is not None:
                        self._ask_shadow(question, choice.shadow, progress)
                    yield part
            except ApiError as error:
                self._ended(question, progress, error.status)
                self._later(self._keep(question, progress, error.status, error.reason or error.code))
                raise
            except (asyncio.CancelledError, GeneratorExit):
                if progress.kept:  # the answer was complete: nobody waited for the end of the stream
                    raise
                progress.finish_reason = "cancelled"
                self._ended(question, progress, CLIENT_GONE)
                self._later(self._keep(question, progress, CLIENT_GONE, "client_gone"))
                raise

    async def _parts(self, question: Question, progress: Progress) -> AsyncIterator[Part]:
        check_asked_schema(question.sampling.json_schema)
        prompt = self._prompt(question, progress)
        reserved = len(prompt) + question.sampling.max_tokens
        self.access.reserve(question.caller, reserved)
        try:
            async for part in self._reserved_parts(question, progress, prompt):
                yield part
        finally:
            self.access.settle(question.caller, reserved, progress.prompt_tokens + progress.completion_tokens)

    async def _reserved_parts(
        self, question: Question, progress: Progress, prompt: list[int]
    ) -> AsyncIterator[Part]:
        held = self._holds_back()
        async for step, text in self._written(prompt, question, progress):
            if not held and progress.finish_reason is None and (text or step.logprobs):
                yield Part(text, step.logprobs)
        last, logprobs = (progress.text, ()) if held else (text, step.logprobs)
        self._check_answer(question, progress)
        try:
            await self._keep(question, progress, 200, None)
        except StoreUnavailable:
            raise errors.store_unavailable() from None
        progress.kept = True
        self._ended(question, progress, 200)
        self._measure(progress)
        usage = Usage(progress.prompt_tokens, progress.completion_tokens)
        yield Part(last, logprobs, progress.finish_reason, usage, progress.valid, progress.mean_logprob)

    def health(self) -> str | None:
        """Return why no request would be answered now, or None."""
        return self.fleet.health() or self._store_problem()

    def _store_problem(self) -> str | None:
        return self.store.health() if self.settings.events.on_failure == "refuse" else None

    def _check_store(self) -> None:
        if (problem := self._store_problem()) is not None:
            logger.error("the event store takes nothing: %s", problem)
            raise errors.store_unavailable()

    def _prompt(self, question: Question, progress: Progress) -> list[int]:
        """Return the token ids to answer, after the guard has looked at the question.

        Raises:
            ApiError: too long, or refused.
        """
        limits = self.settings.guard
        tokenizer = progress.served.tokenizer
        said = question.said()
        texts = [message["content"] for message in said]
        chars = sum(map(len, texts))
        if chars > limits.max_prompt_tokens * MAX_CHARS_PER_TOKEN:
            raise errors.context_length_exceeded(chars // MAX_CHARS_PER_TOKEN, limits.max_prompt_tokens)
        self._look(
            progress,
            "control_tokens",
            "enforce",
            checks.check_control_tokens(texts, special_tokens(tokenizer)),
        )
        if limits.prompt_injection != "off":
            self._look(progress, "prompt_injection", limits.prompt_injection, checks.check_injection(said))
        if limits.toxicity != "off":
            self._look(progress, "toxicity", limits.toxicity, checks.check_toxicity(said))
        if isinstance(question.raw, tuple):
            prompt = list(question.raw)
        elif question.raw is not None:
            prompt = tokenizer(question.raw, add_special_tokens=False)["input_ids"]
        else:
            prompt = encode_prompt(tokenizer, with_system_prompt(question.messages, progress.served))
        progress.prompt_tokens = len(prompt)
        if len(prompt) > limits.max_prompt_tokens:
            raise errors.context_length_exceeded(len(prompt), limits.max_prompt_tokens)
        return prompt

    def _look(
        self,
        progress: Progress,
        check: str,
        policy: str,
        verdict: checks.Verdict,
        param: str | None = "messages",
    ) -> None:
        """Keep a verdict, and refuse if it says so and the policy enforces it."""
        progress.verdicts[check] = verdict
        reason = "allow" if verdict.allow else verdict.reason or check
        get_metrics().verdicts.labels(check, reason, progress.version).inc()
        if policy == "enforce" and not verdict.allow:
            raise errors.content_refused(reason, param)

    async def _written(
        self, prompt: list[int], question: Question, progress: Progress
    ) -> AsyncIterator[tuple[Step, str]]:
        """Yield what the engine writes, with its text; sets the finish reason with the last."""
        sampling = self._sampling(question.sampling, progress.served)
        text = AnswerText(progress.served.tokenizer, question.stops)
        try:
            async with aclosing(progress.served.engine.generate(prompt, sampling)) as steps:  # type: ignore[type-var]
                async for step in steps:
                    piece = text.push(step.token_ids)
                    if step.finish_reason:
                        piece += text.finish()
                    progress.take(step, piece)
                    progress.finish_reason = "stop" if text.stopped else step.finish_reason
                    yield (
                        step if question.sampling.logprobs is not None else replace(step, logprobs=()),
                        piece,
                    )
                    if progress.finish_reason:
                        return
        except SchemaUnsupported as error:
            raise errors.invalid_value("response_format", str(error)) from None
        except ContextOverflow:
            raise errors.context_length_exceeded(len(prompt), progress.served.engine.context_tokens) from None
        except QueueFull:
            raise errors.overloaded(retry_after_s=1.0) from None
        except EngineError:
            logger.exception("%s: the engine failed", question.request_id)
            raise errors.engine_failed(question.request_id) from None
        raise errors.engine_failed(question.request_id)

    def _sampling(self, asked: Sampling, served: Served) -> Sampling:
        """Return how to write: log-probabilities for the watchers, and the task's schema where it is held."""
        schema = asked.json_schema
        if schema is None and self.settings.answers.constrained_decoding:
            schema = answer_schema(served)
        return replace(asked, json_schema=schema, logprobs=asked.logprobs or 0)

    def _holds_back(self) -> bool:
        """Return whether an answer is shown only when it is complete, because the guard may refuse it."""
        limits = self.settings.guard
        return "enforce" in (limits.schema_, limits.secrets, limits.personal_data)

    def _check_answer(self, question: Question, progress: Progress) -> None:
        """Look at the whole answer.

        Raises:
            ApiError: the guard refuses it.
        """
        limits, text = self.settings.guard, progress.text
        schema = question.sampling.json_schema or answer_schema(progress.served)
        if schema is not None and limits.schema_ != "off":
            verdict = checks.check_schema(text, schema)
            progress.valid = verdict.allow
            self._look(progress, "schema", limits.schema_, verdict, None)
        if limits.secrets != "off":
            self._look(progress, "secrets", limits.secrets, checks.check_secrets(text), None)
        if limits.personal_data != "off":
            self._look(
                progress, "personal_data", limits.personal_data, checks.check_personal_data(text), None
            )

    async def _keep(self, question: Question, progress: Progress, status: int, reason: str | None) -> None:
        """Store the exchange.

        Raises:
            StoreUnavailable: it could not be stored, and the settings do not let it be lost.
        """
        try:
            await self.store.record(exchange(question, progress, status, reason, self.settings.events.redact))
        except StoreUnavailable as error:
            logger.error("%s is not stored: %s", question.request_id, error)
            lost = self.settings.events.on_failure == "drop"
            get_metrics().events.labels("lost" if lost else "refused").inc()
            if not lost:
                raise
        else:
            get_metrics().events.labels("stored").inc()

    @staticmethod
    def _ended(question: Question, progress: Progress, status: int) -> None:
        get_metrics().requests.labels(question.route, str(status), progress.version).inc()

    def _measure(self, progress: Progress) -> None:
        metrics, version = get_metrics(), progress.version
        total_s = time.monotonic() - progress.started
        first_s = progress.first_token_s or total_s
        metrics.queue_s.labels(version).observe(progress.queue_s)
        metrics.first_token_s.labels(version).observe(first_s)
        metrics.total_s.labels(version).observe(total_s)
        metrics.tokens.labels("in", version).inc(progress.prompt_tokens)
        metrics.tokens.labels("out", version).inc(progress.completion_tokens)
        if total_s > first_s and progress.completion_tokens > 1:
            metrics.tokens_per_s.labels(version).observe(
                (progress.completion_tokens - 1) / (total_s - first_s)
            )

    def _ask_shadow(self, question: Question, shadow: Served, shown: Progress) -> None:
        """Ask a challenger the same, unseen; left out where too many such answers are being written."""
        if self._shadows >= MAX_SHADOWS:
            get_metrics().shadows.labels("left out", shadow.files.version).inc()
            return
        self._shadows += 1
        self._later(self._shadow(question, shadow, shown.text))

    async def _shadow(self, question: Question, shadow: Served, shown: str) -> None:
        own = replace(
            question, request_id=new_request_id(), received_at=time.time(), shadow_of=question.request_id
        )
        progress = Progress(Choice(shadow, "shadow"))
        try:
            with shadow.in_use():
                prompt = self._prompt(own, progress)
                async for _ in self._written(prompt, own, progress):
                    pass
                self._check_answer(own, progress)
                await self._keep(own, progress, 200, None)
            same = "yes" if progress.text == shown else "no"
            get_metrics().shadows.labels(same, progress.version).inc()
        except ApiError as error:
            logger.info("%s: the shadow of %s failed: %s", own.request_id, question.request_id, error)
        finally:
            self._shadows -= 1

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        """Do this though the request is over; `settle` waits for it."""
        task = asyncio.ensure_future(_logged(work))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def settle(self) -> None:
        """Wait for what is still being stored, before the store closes."""
        while self._background:
            await asyncio.wait(self._background)


async def _logged(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except StoreUnavailable:
        pass  # logged and counted where it was raised, and nobody waits for the outcome
    except Exception:
        logger.exception("work after a request failed")


def check_asked_schema(schema: str | None) -> None:
    """Refuse a schema that no answer could be checked against, before anything is written.

    Raises:
        ApiError: it is no JSON schema, or has parts that are not supported.
    """
    if schema is None:
        return
    try:
        checks.check_schema("null", schema)
    except InputError as error:
        raise errors.invalid_value("response_format", error.what) from None


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Return the tokens that steer the model, which no user may write."""
    return tuple(tokenizer.all_special_tokens)


def with_system_prompt(messages: Sequence[Message], served: Served) -> list[Message]:
    """Put the system prompt of training before a conversation that has none, as the stage collect does."""
    prompt = served.files.about["system_prompt"]
    if prompt and messages[0].role != "system":
        return [Message("system", prompt), *messages]
    return list(messages)


def answer_schema(served: Served) -> str | None:
    """Return the JSON schema of the training answers, as text; None where the task has none."""
    schema = served.files.about["answer_schema"]
    return json.dumps(schema) if schema is not None else None  # in the order that answers are written in


def exchange(
    question: Question, progress: Progress, status: int, reason: str | None, redact: Sequence[str]
) -> Exchange:
    """Return the event of a request: what was asked, what was answered, by whom and how fast."""
    messages: list[Any] = question.said()
    if isinstance(question.raw, tuple):
        messages = [{"role": "raw", "content": question.raw}]
    sampling = question.sampling
    parameters = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "stop": list(question.stops),
        "json_schema": sampling.json_schema,
    }
    return Exchange(
        request_id=question.request_id,
        received_at=question.received_at,
        route=question.route,
        key_id=question.caller.key,
        user=pseudonym(question.user, redact),
        session=pseudonym(question.session, redact),
        role=progress.choice.role,
        shadow_of=question.shadow_of,
        model=progress.served.files.name,
        version=progress.version,
        messages=json.dumps(messages, ensure_ascii=False),
        parameters=json.dumps(parameters),
        status=status,
        reason=reason,
        answer=progress.text if progress.finish_reason else None,
        finish_reason=progress.finish_reason,
        prompt_tokens=progress.prompt_tokens,
        completion_tokens=progress.completion_tokens,
        queue_s=progress.queue_s,
        first_token_s=progress.first_token_s,
        total_s=time.monotonic() - progress.started,
        verdicts=json.dumps({check: [v.allow, v.reason] for check, v in progress.verdicts.items()}),
        valid_output=progress.valid,
        mean_logprob=progress.mean_logprob,
    )
