"""Tasks whose answers may call tools: conversations of an agent, turn by turn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import override

from stages.common.messages import CALLS_KEY, Message, ToolCall, format_calls, read_calls
from stages.common.task.metrics import Metric
from stages.common.task.protocol import Schema, Task
from stages.common.task.tool_answers import (
    ERROR_TYPES,
    MEANINGS,
    TEXT_CLASS,
    find_tool_errors,
    measure_nearness,
    read_object,
    read_tool_answer,
    respell_calls,
    score_tools,
)


@dataclass(frozen=True, slots=True)
class ToolsTask(Task):
    """An answer calls tools, or is text; the share of turns with the right calls decides.

    Answers are texts of `Message.answer`. The class of one is the tool that it calls.
    """

    kind: ClassVar[str] = "tools"
    error_types: ClassVar[tuple[str, ...]] = ERROR_TYPES
    answers_are_json: ClassVar[bool] = False

    @property
    @override
    def primary(self) -> str:
        return "call_match"

    @property
    @override
    def class_name(self) -> str:
        return "tool"

    @property
    @override
    def closed_set(self) -> None:
        return None

    @property
    @override
    def meanings(self) -> Mapping[str, str]:
        return MEANINGS

    @override
    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "label_key": None, "labels": None}

    @override
    def find_problem(self, answer: str) -> str | None:
        text = respell_calls(answer)
        turn = read_tool_answer(text)
        begins_call = CALLS_KEY in read_object(text) or _BEGINS_CALL.match(text)
        if turn.malformed is not None or (not turn.calls and begins_call):
            return f"the answer begins a call that is none: calls are {_FORM}, without NaN or a repeated key"
        if not turn.is_usable:
            return "the answer is empty: it has neither text nor a call"
        if not all(call.tool.strip() for call in turn.calls):
            return "a call names no tool"
        return None

    @override
    def has_one_answer(self, answer: str) -> bool:
        return bool(read_tool_answer(answer.strip()).calls)

    @override
    def canonical(self, answer: str) -> str:
        turn = read_tool_answer(answer.strip())
        return format_calls("", [call.write() for call in turn.calls]) if turn.calls else answer.strip()

    @override
    def rewrite(self, answer: str, schema: Mapping[str, Any] | None, separators: tuple[str, str]) -> str:
        return respell_calls(answer)

    @override
    def read_class(self, answer: str) -> str | None:
        turn = read_tool_answer(answer.strip())
        if not turn.is_usable:
            return None
        return "+".join(turn.tools) or TEXT_CLASS

    @override
    def is_valid(self, answer: str, reference: str) -> bool:
        return read_tool_answer(answer.strip()).is_usable

    @override
    def score(self, answers: Sequence[str], references: Sequence[str]) -> dict[str, Metric]:
        turns = [read_tool_answer(answer.strip()) for answer in answers]
        return score_tools(turns, [read_tool_answer(reference.strip()) for reference in references])

    @override
    def find_errors(self, answer: str, reference: str) -> dict[str, str]:
        return find_tool_errors(read_tool_answer(answer.strip()), read_tool_answer(reference.strip()))

    @override
    def to_message(self, answer: str) -> Message:
        return Message("assistant", *(read_calls(answer) or (answer,)))

    @override
    def format_answer(self, answer: str) -> str:
        turn = read_tool_answer(answer.strip())
        if turn.malformed is not None:
            return f"malformed: {turn.malformed}"
        return " ".join(filter(None, [turn.text.strip(), "; ".join(map(str, turn.calls))]))

    @override
    def nearness(self, answer: str, reference: str) -> float:
        return measure_nearness(read_tool_answer(answer.strip()), read_tool_answer(reference.strip()))

    @override
    def derive_schema(self, answers: Sequence[str]) -> Schema | None:
        return None  # serving holds calls by the schemas of the request's tools

    @override
    def fits(self, schema: Mapping[str, Any] | None, answer: str) -> bool:
        return read_tool_answer(answer.strip()).malformed is None


_BEGINS_CALL = re.compile(rf'{{\s*"{CALLS_KEY}"')  # also where the JSON is broken behind it
_FORM = format_calls("", [ToolCall("...", "{}")])
