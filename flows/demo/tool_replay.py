"""Hold a conversation with tools as an application would: run the calls, return their results, ask on."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from flows.demo.caller import Caller, Habits
from flows.demo.tool_traffic import Question, ToolConversation, list_tools
from stages.common.messages import Tool, ToolCall, format_arguments, format_calls, read_strict_json
from stages.common.sources.home_tools.home import Home
from stages.common.task.tool_answers import calls_match, read_tool_answer
from stages.common.tools.schemas import find_argument_problem

HOMES = 1000  # different ones
MAX_CALL_TOKENS = 192  # the longest call that the demo's tools allow has fewer


@dataclass(slots=True)
class ToolCounts:
    """What came of conversations with tools.

    Attributes:
        asked: requests; calls: whole ones; right: questions answered by the right call.
        malformed: calls of an unknown tool or with arguments outside its schema, and calls that were required
            and did not come.
        cut: calls that `max_tokens` cut off.
        results: that were sent; told: of them, those that an answer followed.
    """

    conversations: int = 0
    asked: int = 0
    calls: int = 0
    right: int = 0
    malformed: int = 0
    cut: int = 0
    results: int = 0
    told: int = 0

    def add(self, other: ToolCounts) -> None:
        """Add the counts of other conversations."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))


async def converse(
    caller: Caller, conversation: ToolConversation, habits: Habits, counts: ToolCounts
) -> None:
    """Hold one conversation; it ends early if a request fails, or if there is a call that cannot be run.

    A question that was answered without a call is followed by one that requires a call.

    Args:
        counts: what comes of it is added.
    """
    moods = random.Random(conversation.session)
    home, waiting = Home(moods.randrange(HOMES)), list(conversation.questions)
    choice = "required" if conversation.is_required else "auto"
    turns: list[dict[str, Any]] = []
    counts.conversations += 1
    for _ in range(conversation.size):
        question = None if turns and turns[-1]["role"] == "tool" else waiting.pop(0)
        if question is not None:
            turns.append({"role": "user", "content": question.text})
        answer = await caller.ask(
            turns,
            conversation.user,
            conversation.session,
            tools=list_tools(),
            tool_choice=choice if question else "none",
            parallel_tool_calls=False,
            max_tokens=max(caller.max_tokens, MAX_CALL_TOKENS) if question else caller.max_tokens,
        )
        counts.asked += 1
        if answer is None:
            return
        said = answer["choices"][0]["message"]
        calls = said.get("tool_calls") or []
        if question is None:
            counts.results += 1
            counts.told += bool(said["content"])
        else:
            is_cut = answer["choices"][0]["finish_reason"] == "length"
            if not _count_calls(calls, choice, is_cut, counts):
                return
            is_right = await _give_feedback(caller, answer["id"], calls, question, habits, moods)
            counts.right += is_right  # not in the line that waits: others change the count meanwhile
            choice = "auto" if calls else "required"
        if not calls and not said["content"]:
            return
        turns.append({key: said[key] for key in ("role", "content", "tool_calls") if said.get(key)})
        turns += [_run(home, call) for call in calls]


def _count_calls(calls: Sequence[Mapping[str, Any]], choice: str, is_cut: bool, counts: ToolCounts) -> bool:
    """Count the calls of an answer; return whether they can be run, if there are any."""
    if is_cut and (calls or choice == "required"):
        counts.cut += 1
        return False
    missing = choice == "required" and not calls
    malformed = missing + sum(not _fits(call["function"]) for call in calls)
    counts.calls += len(calls)
    counts.malformed += malformed
    return not malformed


def _fits(function: Mapping[str, str]) -> bool:
    """Return whether a call names one of the tools and its arguments fit the schema that was sent."""
    tools = {tool["function"]["name"]: tool for tool in list_tools()}
    if function["name"] not in tools:
        return False
    try:
        arguments = read_strict_json(function["arguments"])
    except ValueError:
        return False
    tool = Tool(json.dumps(tools[function["name"]]))
    return isinstance(arguments, dict) and find_argument_problem(tool, arguments) is None


async def _give_feedback(
    caller: Caller,
    request_id: str,
    calls: Sequence[Mapping[str, Any]],
    question: Question,
    habits: Habits,
    moods: random.Random,
) -> bool:
    """Give the feedback of a user who knows the right call; return whether the answer was right."""
    made = [ToolCall(call["function"]["name"], call["function"]["arguments"]) for call in calls]
    right = format_calls("", question.calls)
    is_right = calls_match(read_tool_answer(format_calls("", made)), read_tool_answer(right))
    mood = moods.random()
    if is_right and mood < habits.thumbs_up:
        await caller.confirm(request_id)
    elif not is_right and mood < habits.corrected:
        await caller.correct(request_id, right)
    return is_right


def _run(home: Home, call: Mapping[str, Any]) -> dict[str, Any]:
    """Run a call; return its result as a message."""
    function = call["function"]
    result = home.run(function["name"], json.loads(function["arguments"]))
    return {"role": "tool", "tool_call_id": call["id"], "content": format_arguments(result)}
