"""The state of an answer while it is generated, and the event that is stored of it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from services.answering.request import GenerationRequest
from services.engines.calls.reading import AnswerReader
from services.engines.protocol import Step
from services.events import Exchange
from services.events.outlines import limit_size, outline
from services.guard.checks import GuardDecision
from services.model_pool import LoadedModel, Route
from stages.common.privacy.redaction import pseudonymise


@dataclass(slots=True)
class GenerationState:
    """What is known of an answer so far.

    Attributes:
        started: monotonic time, s.
        decisions: the guard's, by check.
        reader: splits the answer into thoughts, text and calls.
        reasoning: its thoughts so far.
        unread: the prompt is so long that it was refused before anything looked at it.
        stored: whether the store has the event, written or about to be.
    """

    route: Route
    started: float = field(default_factory=time.monotonic)
    decisions: dict[str, GuardDecision] = field(default_factory=dict)
    pieces: list[str] = field(default_factory=list)
    reader: AnswerReader | None = None
    reasoning: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    logprob_sum: float = 0.0
    logprob_count: int = 0
    first_token_s: float | None = None
    queue_s: float = 0.0
    finish_reason: str | None = None
    unread: bool = False
    stored: bool = False

    @property
    def model(self) -> LoadedModel:
        """The model that answers."""
        return self.route.model

    @property
    def version(self) -> str:
        """Content hash of the model."""
        return self.model.files.version

    @property
    def text(self) -> str:
        """What the model has written so far."""
        return "".join(self.pieces)

    @property
    def answer(self) -> str:
        """The answer so far, without thoughts, as the text that is judged (`Message.answer`)."""
        return self.reader.judge() if self.reader else self.text

    @property
    def thoughts(self) -> str:
        """What the model has thought so far, before its answer."""
        return "".join(self.reasoning)

    @property
    def valid(self) -> bool | None:
        """Whether the answer fits its schema; None where that was not checked."""
        decision = self.decisions.get("schema")
        return None if decision is None else decision.allow

    @property
    def mean_logprob(self) -> float | None:
        """Mean log-probability of the tokens so far, in nats; None without any."""
        return self.logprob_sum / self.logprob_count if self.logprob_count else None

    def add(self, step: Step, text: str, reasoning: str) -> None:
        """Add a step of the engine, its text, and what of it is thoughts."""
        if self.first_token_s is None and (step.token_ids or step.finish_reason):
            self.first_token_s = time.monotonic() - self.started
        self.queue_s += step.queue_s
        self.completion_tokens += len(step.token_ids)
        self.logprob_sum += sum(entry.logprob for entry in step.logprobs)
        self.logprob_count += len(step.logprobs)
        if text:
            self.pieces.append(text)
        if reasoning:
            self.reasoning.append(reasoning)


def build_exchange(
    request: GenerationRequest,
    state: GenerationState,
    status: int,
    reason: str | None,
    redact: Sequence[str],
) -> Exchange:
    """Return the event of a request.

    Args:
        status: HTTP status of the response.
        reason: code of the rejection or error.
        redact: kinds of personal data; a user or session that is one is stored as a hash.
    """
    if state.unread:  # to redact a megabyte takes a second, in which no other event is written
        messages = [
            {**one, "content": outline(one["content"])} for one in request.as_texts(state.model.decode_prompt)
        ]
    else:
        messages = request.as_turns(state.model.decode_prompt)
    sampling = request.sampling
    parameters: dict[str, Any] = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "stop": limit_size(list(request.stops)),
        "json_schema": limit_size(sampling.json_schema),
    }
    if request.allowed is not None:
        parameters |= {
            "tools": [] if state.unread else limit_size([tool.value for tool in request.tools]),
            "tool_choice": request.allowed.name or request.allowed.mode,
            "parallel_tool_calls": request.allowed.is_parallel,
        }
    return Exchange(
        request_id=request.request_id,
        received_at=request.received_at,
        route=request.route,
        key_id=request.caller.key,
        user=pseudonymise(request.user, redact),
        session=pseudonymise(request.session, redact),
        role=state.route.role,
        shadow_of=request.shadow_of,
        model=state.model.files.name,
        version=state.version,
        messages=json.dumps(messages, ensure_ascii=False),
        parameters=json.dumps(parameters),
        status=status,
        reason=reason,
        answer=state.answer if state.finish_reason else None,
        reasoning=(state.thoughts or None) if state.finish_reason else None,
        finish_reason=state.finish_reason,
        prompt_tokens=state.prompt_tokens,
        completion_tokens=state.completion_tokens,
        queue_s=state.queue_s,
        first_token_s=state.first_token_s,
        total_s=time.monotonic() - state.started,
        decisions=json.dumps(
            {check: [found.allow, found.reason] for check, found in state.decisions.items()}
        ),
        valid_output=state.valid,
        mean_logprob=state.mean_logprob,
    )
