"""Try tools and calls with the grammar of the service, before a model is trained that it could not serve.

A vocabulary of bytes takes the place of the model's: a grammar is about text, and what it takes byte by byte
it takes in any tokens. So a text that looks like a control token is text here, as it is in training.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, TypeVar

from services.engines.calls.allowed import AllowedCalls, check_schemas, read_schema
from services.engines.calls.grammar import MAX_CALLS, Marks, write_call, write_grammar
from services.engines.grammar import Grammar, compile_grammar, compile_schema
from services.engines.openvino_grammar import check_keywords, write_tags
from services.engines.protocol import SchemaUnsupported
from stages.common.messages import Tool, ToolCall
from stages.common.tools.schemas import DATA_KEYWORDS, NAMED_KEYWORDS

MAX_COMPILE_S = 60.0  # as the service waits for a schema to be tried
MAX_LISTS_S = 120.0  # for lists whose tools have all been tried alone: each row may have a list of its own
SHOWN_CHARS = 40
CALL_ID = "abcdefghi"  # any that the grammar takes
_NO_ARGUMENTS = Tool('{"type":"function","function":{"name":"f"}}')
Result = TypeVar("Result")


def try_probes(matcher: Any, probes: Sequence[str], vocabulary: Any) -> None:
    """Find the next tokens at the begin of an answer, and where the arguments of each tool begin.

    Raises:
        SchemaUnsupported: the grammar outgrows its limits, or no arguments fit a tool.
    """
    Grammar(matcher.deep_copy(), vocabulary.vocab_size).allowed()
    for probe in probes:
        state = Grammar(matcher.deep_copy(), vocabulary.vocab_size)
        for token in vocabulary.tokenize_str(probe, parse_special=True):
            state.take(token)
        if not state.allowed().any():
            raise SchemaUnsupported(f"no arguments fit the schema of a tool, behind {probe!r}")


class CallTrial:
    """Tries the tools of rows and their calls, under one model's notation of calls.

    Args:
        engine: that will serve. Each holds calls by llguidance, but `openvino`: it takes what llguidance and
            its own limits take, and holds it by XGrammar, which cannot be asked without a model.

    Attributes:
        untried: lists of tools of which only each tool was tried, because the time for lists was over.
    """

    def __init__(self, marks: Marks, engine: str = "paged") -> None:
        self._marks = replace(marks, thought_start="", thought_end="", control=())
        self._uses_tags = engine == "openvino"
        self._compile = lru_cache(maxsize=1024)(self._compile_tools)
        self._lists: dict[tuple[Tool, ...], str | None] = {}
        self._lists_s = 0.0
        self.untried = 0

    def find_notation_fault(self) -> str | None:
        """Return why the engine cannot hold calls in this notation, of whatever tools, or None."""
        if not self._uses_tags:
            return None
        try:
            write_tags(write_grammar(self._marks, AllowedCalls((_NO_ARGUMENTS,))).form)
        except SchemaUnsupported as error:
            return str(error)
        return None

    def find_schema_fault(self, tools: Sequence[Tool]) -> str | None:
        """Return why the service cannot hold calls of these tools, with the tool and the place, or None."""
        key = tuple(tools)
        if key not in self._lists:
            self._lists[key] = self._find_schema_fault(key)
        return self._lists[key]

    def _find_schema_fault(self, tools: tuple[Tool, ...]) -> str | None:
        for tool in tools:
            alone = self._compile((tool,))[1]
            if alone is not None:
                place, why = find_place(read_schema(tool), self._hold) or ("$", alone)
                return f"{tool.name}: {place}: {why}"
        problem = self._try_list(tools) if len(tools) > 1 else None
        return f"all {len(tools)} tools together: {problem}" if problem else None

    def _try_list(self, tools: tuple[Tool, ...]) -> str | None:
        """Return why tools that can be held alone cannot be held together, or None."""
        if self._lists_s >= MAX_LISTS_S:
            self.untried += 1
            return _find_bound(tools)
        start = time.monotonic()
        problem = self._compile_tools(tools)[1]
        self._lists_s += time.monotonic() - start
        return problem

    def find_call_fault(self, calls: Sequence[ToolCall], tools: Mapping[str, Tool]) -> str | None:
        """Return which argument the service could not write in an answer with these calls, or None.

        Args:
            tools: by name, those that are called; their schemas have no fault.
        """
        if len(calls) > MAX_CALLS:
            return f"{len(calls)} calls, and an answer has at most {MAX_CALLS}"
        found = (self._find_fault(call, tools[call.name]) for call in calls)
        return next((fault for fault in found if fault), None)

    def _find_fault(self, call: ToolCall, tool: Tool) -> str | None:
        compiled, problem = self._compile((tool,))
        if problem is not None:
            return f"{call.name}: {problem}"
        matcher = compiled.deep_copy()
        found = self._marks.calls
        arguments = json.dumps(call.values, ensure_ascii=False)  # with blanks, as chat templates write them
        text = (
            found.opener.lstrip() + write_call(found, call.name, arguments, CALL_ID) + found.closer
        ).encode()
        taken = matcher.try_consume_tokens(list(text))
        if taken == len(text) and matcher.is_accepting():
            return None
        start = text.index(arguments.encode())
        return f"{call.name}: {_show_place(call, arguments.encode(), max(taken - start, 0))}"

    def _compile_tools(self, tools: tuple[Tool, ...]) -> tuple[Any, str | None]:
        """Return the matcher of these tools' calls, or None and why there is none."""
        try:
            return _limit_time(lambda: _compile(self._marks, tools, self._uses_tags)), None
        except (SchemaUnsupported, TimeoutError) as error:
            return None, str(error)

    def _hold(self, schema: Mapping[str, Any]) -> None:
        """Raise SchemaUnsupported for a schema that the engine cannot hold."""
        compile_schema(json.dumps(schema), _vocabulary())
        if self._uses_tags:
            check_keywords(schema)


def find_unwritten(tool: Tool, call: ToolCall) -> str | None:
    """Return which argument of a call the grammar of its tool's schema could not write, or None.

    It does not depend on the notation of calls. A schema that cannot be compiled is another fault of the row.

    Args:
        call: with arguments that fit the schema, in its order.
    """
    matcher = _compile_arguments(tool)
    if matcher is None:
        return None
    arguments = json.dumps(call.values, ensure_ascii=False).encode()
    matcher = matcher.deep_copy()
    taken = matcher.try_consume_tokens(list(arguments))
    if taken == len(arguments) and matcher.is_accepting():
        return None
    return _show_place(call, arguments, taken)


@lru_cache(maxsize=1024)
def _compile_arguments(tool: Tool) -> Any:
    try:
        return _limit_time(lambda: compile_schema(json.dumps(read_schema(tool)), _vocabulary()))
    except (SchemaUnsupported, TimeoutError):
        return None


def _find_bound(tools: Sequence[Tool]) -> str | None:
    """Return which bound of all schemas together is exceeded, or None."""
    try:
        check_schemas(tools)
    except SchemaUnsupported as error:
        return str(error)
    return None


def find_place(
    schema: Mapping[str, Any], hold: Callable[[Mapping[str, Any]], None]
) -> tuple[str, str] | None:
    """Return the innermost part of a schema that cannot be held, as a path, and why; None if all can.

    Args:
        hold: raises SchemaUnsupported for a schema that cannot be held.
    """
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}

    def search(part: Mapping[str, Any], path: str) -> tuple[str, str] | None:
        for name, inner in _list_parts(part):
            if found := search(inner, f"{path}.{name}"):
                return found
        own = {**definitions, **part} if path != "$" else part
        try:
            _limit_time(lambda: hold(own))
        except (SchemaUnsupported, TimeoutError) as error:
            return path, str(error).removeprefix("the JSON schema cannot be compiled: ")
        return None

    return search(schema, "$")


def _list_parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the schemas that a schema holds, by where they are in it."""
    for keyword, value in schema.items():
        if keyword in DATA_KEYWORDS:
            continue
        if keyword in NAMED_KEYWORDS and isinstance(value, Mapping):
            named = [(f"{keyword}.{name}", inner) for name, inner in value.items()]
        elif isinstance(value, list):
            named = [(f"{keyword}[{place}]", inner) for place, inner in enumerate(value)]
        else:
            named = [(keyword, value)]
        yield from ((name, inner) for name, inner in named if isinstance(inner, Mapping))


def _compile(marks: Marks, tools: tuple[Tool, ...], uses_tags: bool) -> Any:
    check_schemas(tools)
    grammar = write_grammar(marks, AllowedCalls(tools, "required"))
    matcher = compile_grammar(grammar.text, _vocabulary())
    try_probes(matcher, grammar.probes, _vocabulary())
    if uses_tags:
        write_tags(write_grammar(marks, AllowedCalls(tools)).form)
    return matcher


def _show_place(call: ToolCall, arguments: bytes, taken: int) -> str:
    """Return the argument at a place in the text of all, and what is written there."""
    values = call.values
    ends = (
        len(json.dumps(dict(list(values.items())[: count + 1]), ensure_ascii=False).encode()) - 1
        for count in range(len(values))
    )
    name = next((name for name, end in zip(values, ends, strict=True) if taken < end), None)
    before = arguments[:taken].decode(errors="replace")[-SHOWN_CHARS:]
    behind = arguments[taken:].decode(errors="replace")[:SHOWN_CHARS]
    return f"{f'$.{name}' if name else '$'}: behind {before!r} the grammar does not take {behind!r}"


def _limit_time(work: Callable[[], Result]) -> Result:
    """Return the result of work that cannot be interrupted; if it takes long, its thread is left behind.

    Raises:
        TimeoutError: it takes longer than MAX_COMPILE_S.
    """
    done: list[Result] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:  # a panic of the compiler is no Exception
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(MAX_COMPILE_S)
    if thread.is_alive():
        raise TimeoutError(f"it takes more than {MAX_COMPILE_S:g} s to compile")
    if failed:
        problem = failed[0]
        raise problem if isinstance(problem, Exception) else SchemaUnsupported(f"it ends in {problem!r}")
    return done[0]


@dataclass(frozen=True)
class _Bytes:
    """A tokenizer with a token for each byte, and an end."""

    tokens: tuple[bytes, ...] = (*(bytes([byte]) for byte in range(256)), b"</s>")
    eos_token_id: int = 256
    bos_token_id: None = None
    special_token_ids: tuple[int, ...] = (256,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


@cache
def _vocabulary() -> Any:
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Bytes()))
