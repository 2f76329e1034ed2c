"""Convert a request of the Responses API to a generation request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from services import errors
from services.answering.handler import ChatHandler
from services.answering.request import GenerationRequest
from services.api.items.schemas import Item, ResponsesRequest, TextFormat
from services.api.parsing import check_allowed, check_conversation, dump_schema, limit_tokens
from services.api.tools import read_allowed
from services.engines.protocol import Sampling
from services.keys.access import Caller
from stages.common.messages import Message, ToolCall, join_system

ROUTE = "/v1/responses"


def parse_responses_request(
    body: ResponsesRequest, request_id: str, caller: Caller, handler: ChatHandler
) -> GenerationRequest:
    """Return the generation request of a response.

    Raises:
        ApiError: the items are not a conversation, or a limit is exceeded.
    """
    limit = handler.settings.guard.max_messages
    items = body.input if isinstance(body.input, list) else [Item(role="user", content=body.input)]
    if len(items) > limit:
        raise errors.invalid_value("input", f"{len(items)} items; at most {limit} are allowed")
    instructions = [Message("system", body.instructions)] if body.instructions else []
    messages = tuple(join_system([*instructions, *read_items(items)]))
    check_conversation(messages, "input")
    allowed = read_allowed(body.tools or (), body.tool_choice, body.parallel_tool_calls)
    check_allowed(allowed)
    sampling = Sampling(
        max_tokens=limit_tokens(body.max_output_tokens, "max_output_tokens", handler),
        temperature=body.temperature or 0.0,
        top_p=body.top_p or 1.0,
        seed=body.seed,
        json_schema=_write_schema(body.text_format),
    )
    return GenerationRequest(
        request_id=request_id,
        route=ROUTE,
        messages=messages,
        sampling=sampling,
        caller=caller,
        allowed=allowed,
        model=body.model or None,
        user=body.user,
        session=body.session,
    )


def read_items(items: Iterable[Item]) -> Iterator[Message]:
    """Yield the turns that items are: thoughts, a text and calls that follow each other are one turn."""
    turn: Message | None = None  # of the assistant, which later items can add to
    for item in items:
        is_assistant = item.type in ("reasoning", "function_call") or item.role == "assistant"
        if turn is not None and not (is_assistant and _can_add(turn, item)):
            yield turn
            turn = None
        if is_assistant:
            turn = _add(turn or Message("assistant", ""), item)
        elif item.type == "function_call_output":
            yield Message("tool", item.text(), tool_call_id=item.call_id)
        else:
            yield Message("system" if item.role == "developer" else str(item.role), item.text())
    if turn is not None:
        yield turn


def _can_add(turn: Message, item: Item) -> bool:
    """Return whether an item continues a turn: thoughts come before its text.

    Behind calls that wait for their results anything does: OpenAI's API finds a result by the id of its call,
    whatever is between the two, and models write texts behind calls.
    """
    return item.type == "function_call" or bool(turn.tool_calls) or not turn.content


def _add(turn: Message, item: Item) -> Message:
    if item.type == "reasoning":
        return replace(turn, reasoning=(turn.reasoning or "") + item.text())
    if item.type == "message":
        return replace(turn, content="\n\n".join(filter(None, (turn.content, item.text()))))
    call = ToolCall(str(item.name), str(item.arguments), item.call_id)
    return replace(turn, tool_calls=(*turn.tool_calls, call))


def _write_schema(wanted: TextFormat | None) -> str | None:
    return None if wanted is None else dump_schema(wanted.type, wanted.schema_)
