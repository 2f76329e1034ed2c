"""How conversations use tools: how many there are, how often they are called, how long conversations are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stages.common.records import Row


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The measurements of conversations, of their learned turns.

    Attributes:
        tools: different names of the tools listed; most_tools: of one conversation.
        answers: turns of the assistant; calling_answers: those with a call.
        calls: of all turns; most_calls: of one turn.
        questions: turns of users; most_questions: of one conversation.
        conversations: rows.
    """

    tools: int
    most_tools: int
    answers: int
    calling_answers: int
    calls: int
    most_calls: int
    questions: int
    most_questions: int
    conversations: int

    @property
    def calling_share(self) -> float:
        """Return the share of answers that call a tool."""
        return self.calling_answers / self.answers


def measure_tool_use(rows: Sequence[Row]) -> ToolUse | None:
    """Return how the rows use tools; None if no row has tools or calls, and each has one question only."""
    names: set[str] = set()
    tools, calls, questions = [0], [0], [0]
    answers = 0
    for row in rows:
        turns = [m for m in row.messages if m.role == "assistant" and m.is_learned is not False]
        names.update(tool.name for tool in row.tools)
        tools.append(len(row.tools))
        calls += [len(turn.tool_calls) for turn in turns]
        questions.append(sum(m.role == "user" for m in row.messages))
        answers += len(turns)
    if not names and not any(calls) and max(questions) < 2:
        return None
    return ToolUse(
        tools=len(names),
        most_tools=max(tools),
        answers=answers,
        calling_answers=sum(number > 0 for number in calls),
        calls=sum(calls),
        most_calls=max(calls),
        questions=sum(questions),
        most_questions=max(questions),
        conversations=len(rows),
    )
