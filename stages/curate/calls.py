"""The rule about calls of tools: each calls a tool of its row, with arguments that fit the tool's schema.

What fits is the same for a correction that the service takes (`services.engines.calls.learned`). A row of
feedback with another call is one rejected row, where `preflight` would refuse to train at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from services.engines.calls.learned import find_turn_problems
from stages.common.messages import Tool
from stages.common.records import Row
from stages.common.task.protocol import Task
from stages.curate.rules import Rejection, Rule


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


def _find_problems(row: Row, tools: Mapping[str, Tool]) -> Iterator[Rejection]:
    for place, message in enumerate(row.messages, start=1):
        if message.role != "assistant" or message.is_learned is False:
            continue
        for problem in find_turn_problems(message, tools):
            yield Rejection(problem.reason, f"message {place}: {problem.what}; fix: {problem.fix}")
