"""How an exchange uses tools: those it offers, the calls of its answer, and whether it answers a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from monitoring.traffic.answer_json import MAX_VALUE_CHARS, parse_json
from stages.common.messages import is_malformed, read_calls
from stages.common.task.tool_answers import TEXT_CLASS, ToolAnswer, read_tool_answer

MALFORMED = "(malformed)"
EMPTY = "(empty)"


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of one exchange.

    Attributes:
        offered_tools: how many the request has.
        after_result: 1 if the answer follows the result of a tool, else 0.
        answer: None where it is incomplete.
    """

    offered_tools: int
    after_result: float
    answer: ToolAnswer | None

    @property
    def called_tools(self) -> str | None:
        """The names of the tools that the answer calls; words in brackets where it calls none."""
        if self.answer is None:
            return None
        if self.answer.malformed is not None:
            return MALFORMED
        names = "+".join(self.answer.tools)[:MAX_VALUE_CHARS]
        return names or (TEXT_CLASS if self.answer.is_usable else EMPTY)

    @property
    def calls(self) -> int | None:
        """The number of calls; none where they cannot be counted."""
        return None if self.answer is None or self.answer.malformed is not None else len(self.answer.calls)

    @property
    def malformed_call(self) -> float | None:
        """1 if a call begins in the answer that is none, else 0."""
        return None if self.answer is None else float(self.answer.malformed is not None)


def read_tool_use(
    messages: Sequence[Mapping[str, Any]], parameters: str, answer: str | None
) -> ToolUse | None:
    """Return how an exchange uses tools, None if it has none.

    Args:
        messages, parameters: of the request, as it is stored.
        answer: None where it is incomplete.
    """
    tools = list_tools(parameters)
    has_results = any(message["role"] == "tool" for message in messages)
    if not tools and not has_results and not (answer is not None and is_call(answer)):
        return None
    return ToolUse(
        len(tools),
        float(bool(messages) and messages[-1]["role"] == "tool"),
        None if answer is None else read_tool_answer(answer),
    )


def list_tools(parameters: str) -> list[Any]:
    """Return the tools in the parameters of a request, as it is stored; none where there are none."""
    value = parse_json(parameters) if '"tools"' in parameters else {}
    found = value.get("tools") if isinstance(value, dict) else None
    return found if isinstance(found, list) else []


def is_call(answer: str) -> bool:
    """Return whether an answer is calls of tools or a malformed one, and so no JSON of the task's own."""
    return is_malformed(answer) or read_calls(answer) is not None
