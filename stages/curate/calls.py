"""The rule about calls of tools: each calls a tool of its row, with arguments that fit the tool's schema.

They fit for a validator, and for the grammar that holds calls when the model is served: it writes a `format`.
A row of feedback with such a call is one rejected row, where `preflight` would refuse to train at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec

from services.engines.calls.trial import find_unwritten
from stages.common.messages import Message, Tool, ToolCall, is_malformed, read_calls
from stages.common.params.checked_yaml import suggest_nearest
from stages.common.records import Row
from stages.common.task.protocol import Task
from stages.common.tools.schemas import find_argument_problem
from stages.curate.rules import Rejection, Rule

# What begins a call in the notation of a model: Hermes and Qwen, Llama, Mistral, functionary, Phi, DeepSeek.
# A text with one of them teaches the model to write calls that its template does not know.
OPENERS = (
    "<tool_call>",
    "<|python_tag|>",
    "[TOOL_CALLS]",
    "<function=",
    "<|tool_call|>",
    "<|tool▁calls▁begin|>",
)


def check_calls(task: Task) -> Rule:
    """Return the rule that rejects calls that the tools of their row do not allow, and texts that are calls.

    Turns of weight 0 are not looked at: they may show what went wrong before the right call.
    """

    def rule(row: Row) -> Rejection | None:
        turns = (*row.messages, row.rejected) if row.rejected else row.messages
        has_calls = any(message.tool_calls for message in turns)
        if has_calls and task.kind != "tools":
            return Rejection("tool_call", f"task.kind is {task.kind}; fix: set task.kind: tools")
        if not row.tools and task.kind != "tools":
            return None
        tools = {tool.name: tool for tool in row.tools}
        return next(_find_problems(row, tools), None)

    return rule


def _find_problems(row: Row, tools: dict[str, Tool]) -> Iterator[Rejection]:
    for place, message in enumerate(row.messages, start=1):
        if message.role != "assistant" or message.is_learned is False:
            continue
        for call in message.tool_calls:
            if problem := _check_call(call, tools, place):
                yield problem
        if _is_call_in_text(message):
            yield Rejection(
                "call_as_text", f"message {place} has a call in its text; fix: write it in tool_calls"
            )


def _check_call(call: ToolCall, tools: dict[str, Tool], place: int) -> Rejection | None:
    tool = tools.get(call.name)
    if tool is None:
        has = f"is none of the row's {len(tools)} tools" if tools else "is called, and the row lists no tools"
        return Rejection(
            "unknown_tool", f"message {place}: {call.name!r} {has}{suggest_nearest(call.name, tools)}"
        )
    problem = find_argument_problem(tool, call.values)
    if problem is None and _has_grammar():
        problem = find_unwritten(tool, call)
    return Rejection("wrong_arguments", f"message {place}: {call.name}: {problem}") if problem else None


@cache
def _has_grammar() -> bool:
    """Return whether the grammar of the service is installed; without it `preflight` asks for it."""
    return find_spec("llguidance") is not None


def _is_call_in_text(message: Message) -> bool:
    """Return whether a text is a call in the notation of the judged text, or holds that of a model."""
    text = message.content
    return (
        read_calls(text.strip()) is not None
        or is_malformed(text.strip())
        or any(opener in text for opener in OPENERS)
    )
