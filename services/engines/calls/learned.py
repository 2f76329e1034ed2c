"""What a turn that calls tools must be for a model to learn it: one check for rows, and for corrections.

Its calls fit their tools for a validator, and for the grammar that holds calls when the model is served: it
writes a `format`. Where a row comes with another call, `curate` rejects it; the service refuses a correction.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Any

from services.engines.calls.trial import find_unwritten
from stages.common.messages import Message, Tool, ToolCall, format_arguments, is_malformed, read_calls
from stages.common.params.checked_yaml import suggest_nearest
from stages.common.tools.arguments import is_same, list_changes
from stages.common.tools.schemas import find_argument_problem

# What begins a call in the notation of a model. A text with one of them teaches the model to write calls that
# its template does not know.
OPENERS = (
    "<tool_call>",  # Hermes, Qwen, GLM
    "<|python_tag|>",  # Llama
    "[TOOL_CALLS]",  # Mistral
    "<function=",  # functionary
    "<|tool_call|>",  # Phi, Granite
    "<|tool_call>",  # Gemma 4
    "<start_function_call>",  # FunctionGemma
    "<\uff5ctool\u2581calls\u2581begin\uff5c>",  # DeepSeek, whose bars are wide
    "<|tool_calls_section_begin|>",  # Kimi
    "<|tool_call_start|>",  # LFM
    "<minimax:tool_call>",
    "<functioncall>",  # of no model, but of glaive's rows
)


@dataclass(frozen=True, slots=True)
class TurnProblem:
    """Why a turn cannot be learned: a word to count by, what is wrong, and what to do."""

    reason: str
    what: str
    fix: str


def find_turn_problems(turn: Message, tools: Mapping[str, Tool]) -> Iterator[TurnProblem]:
    """Yield what is wrong with the calls and the text of a turn.

    Args:
        turn: its arguments spelled, as by `spell_turn`.
        tools: that it may call, by their names.
    """
    for call in turn.tool_calls:
        if problem := _find_call_problem(call, tools):
            yield problem
    if _is_call_in_text(turn.content):
        yield TurnProblem("call_as_text", "there is a call in the text", "write it in tool_calls")


def explain_turn(turn: Message, tools: Mapping[str, Tool], changes: Collection[str]) -> str | None:
    """Return why a turn cannot be learned, and what to do; None if it can.

    Args:
        changes: as for `spell_turn`.
    """
    problem = next(find_turn_problems(spell_turn(turn, tools, changes), tools), None)
    return f"{problem.what}; fix: {problem.fix}" if problem else None


def spell_turn(turn: Message, tools: Mapping[str, Tool], changes: Collection[str]) -> Message:
    """Return a turn with the arguments of its calls as the grammar writes them: `curate` spells rows so.

    Args:
        changes: what is changed, as in `curate.normalize`.
    """
    calls = tuple(
        _spell_call(call, tools[call.name], changes) if call.name in tools else call
        for call in turn.tool_calls
    )
    return replace(turn, tool_calls=calls)


def _spell_call(call: ToolCall, tool: Tool, changes: Collection[str]) -> ToolCall:
    values: Any = call.values
    for name, change in list_changes(tool).items():
        values = change(values) if name in changes else values
    return call if is_same(values, call.values) else replace(call, arguments=format_arguments(values))


def _find_call_problem(call: ToolCall, tools: Mapping[str, Tool]) -> TurnProblem | None:
    tool = tools.get(call.name)
    if tool is None:
        known = f"is none of the {len(tools)} tools" if tools else "is called, and there are no tools"
        near = suggest_nearest(call.name, tools)
        return TurnProblem("unknown_tool", f"{call.name!r} {known}{near}", "call one of the tools")
    problem = find_argument_problem(tool, call.values)
    if problem is None and _has_grammar():
        problem = find_unwritten(tool, call)
    fix = "give arguments that fit the tool's schema"
    return TurnProblem("wrong_arguments", f"{call.name}: {problem}", fix) if problem else None


@cache
def _has_grammar() -> bool:
    """Return whether the grammar of the service is installed; without it `preflight` asks for it."""
    return find_spec("llguidance") is not None


def _is_call_in_text(text: str) -> bool:
    """Return whether a text is a call in the notation of the judged text, or holds that of a model."""
    return (
        read_calls(text.strip()) is not None
        or is_malformed(text.strip())
        or any(opener in text for opener in OPENERS)
    )
