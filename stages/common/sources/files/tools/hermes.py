"""Hermes' notation, in which tools, calls and results are in the text of the messages.

`<tools>[…]</tools>` in the system message, `<tool_call>{…}</tool_call>` in answers, and
`<tool_response>…</tool_response>` in results. Its files have objects of Python, too: `{'a': True}`.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from stages.common.messages import Tool, ToolCall
from stages.common.sources.files.entries import BadRow, shorten
from stages.common.sources.files.strict_json import RepeatedKeys, decode_json
from stages.common.sources.files.tools.calls import read_calls
from stages.common.sources.files.tools.schemas import read_tools

TOOLS = re.compile(r"<tools>\s*([\[{].*?)\s*</tools>", re.DOTALL)
OPENER, CLOSER = "<tool_call>", "</tool_call>"
CALL_BEGINS = re.compile(r"<tool_call>\s*(?=[\[{])")
RESPONSE_OPENER, RESPONSE_CLOSER = "<tool_response>", "</tool_response>"
# What the usual prompts have before the sentence that mentions the tags.
HEADING = re.compile(
    r"(?:^|\s*\n)\s*# Tools\s*(?:You may call one or more functions to assist with the user query\.)?\s*$"
)
SENTENCE_END = re.compile(r"[.!?]\s+|\n")
MAX_LITERAL_CHARS = 100_000


def take_tools(system: str, forms: set[str]) -> tuple[str, tuple[Tool, ...]]:
    """Return a system message without the description of tools and of the notation, and the tools.

    The chat template writes both again, in its own notation. What is left out begins with the sentence that
    first mentions the tags, and ends with the last example of a call; the rest is the author's own.

    Raises:
        BadRow: the tools cannot be read.
    """
    found = TOOLS.search(system)
    if not found:
        return system, ()
    tools = read_tools(_decode_tools(found[1]), forms)
    first = system.find("<tools>")
    start = max((match.end() for match in SENTENCE_END.finditer(system, 0, first)), default=0)
    last = system.rfind(CLOSER)
    end = max(found.end(), last + len(CLOSER) if last >= 0 else 0)
    before, after = HEADING.sub("", system[:start]).strip(), system[end:].strip()
    forms.add("Hermes <tools> in the system message")
    return "\n\n".join(filter(None, (before, after))), tools


def take_calls(content: str, place: str, forms: set[str]) -> tuple[str, tuple[ToolCall, ...]]:
    """Return an answer's text before its calls, and the calls; a text that only mentions the tag stays whole.

    Raises:
        BadRow: a call is broken or not closed, or has text after it.
    """
    found = CALL_BEGINS.search(content)
    if not found:
        return content, ()
    calls: list[ToolCall] = []
    rest = content[found.start() :]
    while rest.strip():
        if not rest.startswith(OPENER):
            raise BadRow("wrong_call", f"{place} has text after a call: {shorten(rest.strip())}")
        text, closer, rest = rest.removeprefix(OPENER).partition(CLOSER)
        if not closer:
            raise BadRow("wrong_call", f"{place}: {OPENER} is not closed: {shorten(text.strip())}")
        where = f"{place}, call {len(calls) + 1}"
        calls += read_calls(decode_call(text.strip(), where), where)
        rest = rest.lstrip()
    forms.add("Hermes <tool_call> in texts")
    return content[: found.start()].strip(), tuple(calls)


def split_results(content: str) -> list[str] | None:
    """Return the results of a text that consists of `<tool_response>` blocks; None for any other text."""
    results, rest = [], content.strip()
    while rest.startswith(RESPONSE_OPENER):
        text, closer, rest = rest.removeprefix(RESPONSE_OPENER).partition(RESPONSE_CLOSER)
        if not closer:
            return None
        results.append(text.strip())
        rest = rest.lstrip()
    return results if results and not rest else None


def _decode_tools(text: str) -> Any:
    """Return the tools of a block: a list, or one object a line."""
    try:
        return decode_call(text, "the system message")
    except BadRow:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) < 2:
            raise BadRow(
                "wrong_tools", f"the <tools> of the system message are not JSON: {shorten(text)}"
            ) from None
    try:
        return [decode_call(line.strip(), "the system message") for line in lines]
    except BadRow as error:
        raise BadRow("wrong_tools", f"the <tools> of the system message: {error.detail}") from None


def decode_call(text: str, place: str) -> Any:
    """Return the value of a text that is JSON, or a literal of Python.

    Raises:
        BadRow: it is neither.
    """
    try:
        return decode_json(text)
    except ValueError as error:
        problem = str(error)
    try:
        if len(text) > MAX_LITERAL_CHARS:
            raise ValueError
        return _read_literal(ast.parse(text, mode="eval").body)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise BadRow("wrong_call", f"{place} is not JSON: {problem}: {shorten(text)}") from None


def _read_literal(node: ast.expr) -> Any:
    """Return the value of a literal of Python; an object with a key given twice is marked as such."""
    match node:
        case ast.Dict(keys, values):
            names: list[str] = [key.value for key in keys if isinstance(key, ast.Constant)]  # type: ignore[misc]
            if len(names) < len(keys) or not all(isinstance(name, str) for name in names):
                raise ValueError
            found = dict(zip(names, map(_read_literal, values), strict=True))
            if len(found) < len(names):
                marked = RepeatedKeys(found)
                marked.key = next(name for name in names if names.count(name) > 1)
                return marked
            return found
        case ast.List(items) | ast.Tuple(items):
            return [_read_literal(item) for item in items]
    value = ast.literal_eval(node)
    if not (value is None or isinstance(value, str | int | float)):
        raise ValueError
    return value
