"""Take feedback on an answer: check it, and store it with the answer that it is about."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from services import errors
from services.answering.handler import ChatHandler
from services.engines.calls.bounds import MAX_DEPTH, is_deep
from services.engines.protocol import QueueFull, SchemaUnsupported
from services.events import Feedback, StoreUnavailable
from services.guard import policy
from stages.common.messages import Tool, read_calls
from stages.common.params.checked_yaml import suggest_nearest
from stages.common.privacy.redaction import redact, redact_json
from stages.common.task.tool_answers import respell_calls
from stages.common.task.tools_task import ToolsTask

# Threads of its own: asyncio's are shared by all requests, and formatting a few large answers fills them.
_THREADS = ThreadPoolExecutor(4, thread_name_prefix="feedback")


async def take_feedback(given: Feedback, handler: ChatHandler) -> None:
    """Store feedback on an answer.

    Raises:
        ApiError: there is no such answer, the guard rejects the correction, its calls do not fit the tools
            of the request, or the store fails.
    """
    try:
        parameters = await asyncio.get_running_loop().run_in_executor(_THREADS, _check, given, handler)
        if given.correction and (tools := _read_tools(parameters)):
            await _check_calls(given.correction, tools, handler)
        await handler.store.record(given)
    except StoreUnavailable:
        raise errors.store_unavailable() from None


def _check(given: Feedback, handler: ChatHandler) -> str:
    """Return the parameters of the request that the feedback is about.

    Raises:
        ApiError: the guard rejects the correction, or there is no such answer.
    """
    if given.correction:
        _check_correction(given.correction, handler)
    parameters = handler.store.find_parameters(given.request_id)
    if parameters is None:
        raise errors.invalid_value("request_id", f"there is no answer with the id {given.request_id!r}")
    return parameters


def _check_correction(correction: str, handler: ChatHandler) -> None:
    """Reject a correction that the guard does not allow: it may become an answer that a model learns."""
    settings = handler.settings.guard
    for result in policy.check_correction(correction, handler.pool.champion.control_tokens, settings):
        if result.policy == "enforce" and not result.decision.allow:
            raise errors.content_refused(result.decision.reason or result.check, "correction")


def _read_tools(parameters: str) -> dict[str, Tool]:
    """Return the tools of a stored request by their names; none where the event is damaged."""
    try:
        tools = [Tool(json.dumps(value)) for value in json.loads(parameters).get("tools") or ()]
        return {tool.name: tool for tool in tools}
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}


async def _check_calls(correction: str, tools: Mapping[str, Tool], handler: ChatHandler) -> None:
    """Reject a correction whose calls could not be run with the tools of the request.

    Raises:
        ApiError: invalid_value; or overloaded, if too many corrections wait to be checked.
    """
    try:
        problem = await _find_call_problem(correction, tools, handler)
        if problem is None:
            return
        # The store redacts the tools: an address that is in an `enum` fits only if it is redacted as well.
        redacted = await asyncio.get_running_loop().run_in_executor(_THREADS, _redact, correction, handler)
        if redacted != correction and await _find_call_problem(redacted, tools, handler) is None:
            return
    except SchemaUnsupported as error:
        problem = f"its calls cannot be checked: {error}; fix: correct answers to simpler tools"
    except QueueFull:
        raise errors.overloaded(retry_after_s=1.0) from None
    raise errors.invalid_value("correction", problem)


def _redact(correction: str, handler: ChatHandler) -> str:
    return redact_json(correction, lambda text: redact(text, handler.settings.events.redact))


async def _find_call_problem(correction: str, tools: Mapping[str, Tool], handler: ChatHandler) -> str | None:
    try:
        text = respell_calls(correction)
        problem = ToolsTask().find_problem(text)
    except RecursionError:
        problem = "it is nested too deeply to be read"
    if problem is not None:
        return f"{problem}; fix: give each call a tool and its arguments, or write an answer in words"
    _, calls = read_calls(text) or ("", ())
    for call in calls:
        if call.name not in tools:
            near = suggest_nearest(call.name, tools)
            return f"{call.name!r} is none of the request's {len(tools)} tools{near}; fix: call one of them"
        if is_deep(call.values):
            return (
                f"{call.name}: its arguments are nested more than {MAX_DEPTH} levels deep; fix: flatten them"
            )
    problem = await handler.schemas.find_wrong_call(calls, tools) if calls else None
    return f"{problem}; fix: give arguments that fit the tool's schema in the request" if problem else None
