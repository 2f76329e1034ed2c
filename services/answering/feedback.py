"""Take feedback on an answer: check it, and store it with the answer that it is about.

A correction that `curate` would reject as an answer is refused here, by the same check.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from services import errors
from services.answering.handler import ChatHandler
from services.engines.calls.bounds import MAX_DEPTH, is_deep
from services.engines.calls.learned import explain_turn
from services.engines.protocol import QueueFull, SchemaUnsupported
from services.events import Feedback, StoreUnavailable
from services.guard import policy
from stages.common.messages import Tool
from stages.common.privacy.redaction import redact, redact_json
from stages.common.task.tool_answers import respell_calls
from stages.common.task.tools_task import ToolsTask

# Threads of its own: asyncio's are shared by all requests, and formatting a few large answers fills them.
_THREADS = ThreadPoolExecutor(4, thread_name_prefix="feedback")
RAW_ROUTE = "/v1/completions"  # a text to go on with has no right answer of the task
SHOWN = 10  # labels in a message


async def take_feedback(given: Feedback, handler: ChatHandler) -> None:
    """Store feedback on an answer.

    Raises:
        ApiError: there is no such answer, the guard rejects the correction, it is no answer that a model of
            this task may learn, or the store fails.
    """
    try:
        route, parameters = await asyncio.get_running_loop().run_in_executor(_THREADS, _check, given, handler)
        if given.correction:
            await _check_answer(given.correction, route, parameters, handler)
        await handler.store.record(given)
    except StoreUnavailable:
        raise errors.store_unavailable() from None


def _check(given: Feedback, handler: ChatHandler) -> tuple[str, dict[str, Any]]:
    """Return the route and the parameters of the request that the feedback is about.

    Raises:
        ApiError: the guard rejects the correction, or there is no such answer.
    """
    if given.correction:
        _check_correction(given.correction, handler)
    found = handler.store.find_request(given.request_id)
    if found is None:
        raise errors.invalid_value("request_id", f"there is no answer with the id {given.request_id!r}")
    route, parameters = found
    return route, _read_object(parameters)


def _read_object(text: str) -> dict[str, Any]:
    """Return a JSON object; an empty one where the event is damaged."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _check_correction(correction: str, handler: ChatHandler) -> None:
    """Reject a correction that the guard does not allow: it may become an answer that a model learns."""
    settings = handler.settings.guard
    for result in policy.check_correction(correction, handler.pool.champion.control_tokens, settings):
        if result.policy == "enforce" and not result.decision.allow:
            raise errors.content_refused(result.decision.reason or result.check, "correction")


async def _check_answer(
    correction: str, route: str, parameters: Mapping[str, Any], handler: ChatHandler
) -> None:
    """Reject a correction that no model may learn as the answer to this request.

    Where the request asked for a text or a form of its own, which no task has, any text is taken.

    Raises:
        ApiError: invalid_value; or overloaded, if too many corrections wait to be checked.
    """
    tools, task = _read_tools(parameters), handler.pool.champion.task
    if parameters.get("tools"):
        if tools:  # else the event is damaged, or has only a hash of tools that are very long
            await _check_turn(correction, tools, handler)
    elif route == RAW_ROUTE or parameters.get("json_schema") is not None:
        return
    elif task.kind == "tools":
        await _check_turn(correction, {}, handler)
    elif problem := task.find_problem(correction):
        labels = ", ".join((task.closed_set or ())[:SHOWN])
        fix = f"write one of {labels}" if labels else f"write an answer of the kind {task.kind}"
        raise errors.invalid_value("correction", f"{problem}; fix: {fix}")


def _read_tools(parameters: Mapping[str, Any]) -> dict[str, Tool]:
    """Return the tools of a stored request by their names; none where the event is damaged."""
    try:
        tools = [Tool(json.dumps(value)) for value in parameters.get("tools") or ()]
        return {tool.name: tool for tool in tools}
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}


async def _check_turn(correction: str, tools: Mapping[str, Tool], handler: ChatHandler) -> None:
    """Reject a correction whose calls could not be run with the tools of the request, or not be written.

    Raises:
        ApiError: as `_check_answer`.
    """
    try:
        problem = await _find_turn_problem(correction, tools, handler)
        if problem is None:
            return
        # The store redacts the tools: an address that is in an `enum` fits only if it is redacted as well.
        redacted = await asyncio.get_running_loop().run_in_executor(_THREADS, _redact, correction, handler)
        if redacted != correction and await _find_turn_problem(redacted, tools, handler) is None:
            return
    except SchemaUnsupported as error:
        problem = f"its calls cannot be checked: {error}; fix: correct answers to simpler tools"
    except QueueFull:
        raise errors.overloaded(retry_after_s=1.0) from None
    raise errors.invalid_value("correction", problem)


def _redact(correction: str, handler: ChatHandler) -> str:
    return redact_json(correction, lambda text: redact(text, handler.settings.events.redact))


async def _find_turn_problem(correction: str, tools: Mapping[str, Tool], handler: ChatHandler) -> str | None:
    try:
        text = respell_calls(correction)
        problem = ToolsTask().find_problem(text)
    except RecursionError:
        problem = "it is nested too deeply to be read"
    if problem is not None:
        return f"{problem}; fix: give each call a tool and its arguments, or write an answer in words"
    turn = ToolsTask().to_message(text)
    deep = next((call for call in turn.tool_calls if is_deep(call.values)), None)
    if deep is not None:
        return f"{deep.name}: its arguments are nested more than {MAX_DEPTH} levels deep; fix: flatten them"
    changes = handler.pool.champion.normalize
    if not turn.tool_calls:
        return explain_turn(turn, tools, changes)
    return await handler.schemas.find_wrong_turn(turn, tools, changes)
