"""Convert request bodies to generation requests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from services import errors
from services.answering.handler import ChatHandler
from services.answering.request import GenerationRequest
from services.api.schemas import ChatMessage, ChatRequest, CompletionRequest, ResponseFormat
from services.api.tools import read_allowed
from services.engines.calls.allowed import AllowedCalls, check_schemas
from services.engines.protocol import Sampling, SchemaUnsupported
from services.keys.access import Caller
from stages.common.messages import Message, find_call_problem, join_system


def parse_chat_request(
    body: ChatRequest, request_id: str, caller: Caller, handler: ChatHandler
) -> GenerationRequest:
    """Return the generation request of a chat completion.

    Raises:
        ApiError: the messages are not a conversation, or a limit is exceeded.
    """
    limit = handler.settings.guard.max_messages
    if len(body.messages) > limit:
        raise errors.invalid_value("messages", f"{len(body.messages)} messages; at most {limit} are allowed")
    messages = tuple(join_system(list(map(_read_message, body.messages))))
    check_conversation(messages, "messages")
    allowed = read_allowed(body.tools or (), body.tool_choice, body.parallel_tool_calls)
    check_allowed(allowed)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sent = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    sampling = _parse_sampling(body, sent, logprobs, handler)
    request = _make_request("/v1/chat/completions", request_id, body, caller, sampling, messages, None)
    return replace(request, allowed=allowed)


def parse_completion_requests(
    body: CompletionRequest, request_id: str, caller: Caller, handler: ChatHandler
) -> list[GenerationRequest]:
    """Return the generation requests of a completion, one a prompt; the first has the request's own id.

    Raises:
        ApiError: a token id is out of range, or a limit is exceeded.
    """
    prompts, limit = body.prompts(), handler.settings.guard.max_prompts
    if len(prompts) > limit:
        raise errors.invalid_value("prompt", f"{len(prompts)} prompts; at most {limit} are allowed")
    size = len(handler.pool.champion.tokenizer)
    for prompt in prompts:
        wrong = None if isinstance(prompt, str) else next((n for n in prompt if not 0 <= n < size), None)
        if wrong is not None:
            raise errors.invalid_value("prompt", f"{wrong} is not a token id; the range is 0 to {size - 1}")
    handler.access.count_further(caller, len(prompts) - 1)
    sampling = _parse_sampling(body, "max_tokens", body.logprobs, handler)
    if body.echo and body.logprobs is not None:
        sampling = replace(sampling, prompt_logprobs=True)
    first = replace(
        _make_request("/v1/completions", request_id, body, caller, sampling, (), prompts[0]),
        echo=bool(body.echo),
    )
    further = [
        replace(first, request_id=f"{request_id}-{place}", raw=prompt)
        for place, prompt in enumerate(prompts[1:], start=1)
    ]
    return [first, *further]


def check_conversation(messages: Sequence[Message], param: str) -> None:
    """Check that a user takes part, no turn of the assistant is empty, and each result answers a call.

    A system message in the middle, which agents send, is left to the model's template.

    Args:
        param: the field of the request that has the conversation.

    Raises:
        ApiError: invalid_value.
    """
    if all(message.role != "user" for message in messages):
        raise errors.invalid_value(param, "there is no message with the role user")
    if problem := find_call_problem(messages):
        raise errors.invalid_value(param, problem)


def check_allowed(allowed: AllowedCalls | None) -> None:
    """Check the schemas of a request's tools against the bounds.

    Raises:
        ApiError: invalid_value.
    """
    try:
        check_schemas(allowed.tools if allowed else ())
    except SchemaUnsupported as error:
        raise errors.invalid_value("tools", str(error)) from None


def _read_message(message: ChatMessage) -> Message:
    return Message(
        "system" if message.role == "developer" else message.role,
        message.text(),
        tuple(call.read() for call in message.tool_calls or ()),
        message.tool_call_id,
        message.reasoning_content,
    )


def _make_request(
    route: str,
    request_id: str,
    body: ChatRequest | CompletionRequest,
    caller: Caller,
    sampling: Sampling,
    messages: tuple[Message, ...],
    raw: str | tuple[int, ...] | None,
) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        route=route,
        messages=messages,
        raw=raw,
        sampling=sampling,
        stops=body.stops(),
        model=body.model or None,
        caller=caller,
        user=body.user,
        session=body.session,
    )


def _parse_sampling(
    body: ChatRequest | CompletionRequest, length: str, logprobs: int | None, handler: ChatHandler
) -> Sampling:
    """Return the sampling parameters; `length` is the field that limits the answer."""
    return Sampling(
        max_tokens=limit_tokens(getattr(body, length), length, handler),
        temperature=body.temperature or 0.0,
        top_p=body.top_p or 1.0,
        seed=body.seed,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logprobs=logprobs,
        json_schema=_read_schema(body.response_format),
    )


def limit_tokens(wanted: int | None, param: str, handler: ChatHandler) -> int:
    """Return the most tokens of an answer; `param` is the field that limits it.

    Raises:
        ApiError: invalid_value, where more than the limit are rejected.
    """
    answers = handler.settings.answers
    if wanted is None:
        return answers.default_max_tokens
    if wanted > answers.max_tokens and answers.above_max_tokens == "reject":
        raise errors.invalid_value(param, f"{wanted} is above the limit of {answers.max_tokens}")
    return min(wanted, answers.max_tokens)


def dump_schema(kind: str, schema: dict[str, Any] | None) -> str | None:
    """Return the JSON schema of an answer's form, `text`, `json_object` or `json_schema`; None for text."""
    if kind == "text":
        return None
    # Keys keep their order: answers are generated in it.
    return json.dumps({"type": "object"} if schema is None else schema)


def _read_schema(wanted: ResponseFormat | None) -> str | None:
    if wanted is None:
        return None
    return dump_schema(wanted.type, wanted.json_schema.schema_ if wanted.json_schema else None)
