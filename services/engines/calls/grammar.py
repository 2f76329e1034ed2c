"""The grammar of an answer that may call tools, in llguidance's form of Lark.

It is built from the notation that the model's chat template has (`CallFormat`), so that a call cannot be
malformed, name an unknown tool, or have arguments outside their schema, whatever the model.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from services.engines.calls.allowed import AllowedCalls, read_schema
from services.engines.grammar import set_whitespace
from services.engines.protocol import CallForm, SchemaUnsupported
from stages.common.chat.calls import CallFormat
from stages.common.messages import Tool

MAX_CALLS = 32  # of one answer
ID_PATTERN = "[a-zA-Z0-9]{9}"  # what templates that write ids accept (Mistral)
_ANY = r"[\s\S]*"
_BLANKS = "".join(f"\\u{{{n:x}}}" for n in range(sys.maxunicode) if chr(n).isspace())


@dataclass(frozen=True, slots=True)
class Marks:
    """What a model writes around thoughts and calls.

    Attributes:
        calls: how calls are written.
        thought_start, thought_end: what is around the thoughts before an answer; empty where the model does
            not think.
        control: ids of the added tokens by their text: llguidance takes some of them for no text.
    """

    calls: CallFormat
    thought_start: str
    thought_end: str
    control: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class CallGrammar:
    """The grammar of an answer.

    Attributes:
        text: in llguidance's form of Lark.
        probes: beginnings of answers, each up to the arguments of one tool, where a grammar has most to do.
        schemas: of the arguments of each tool.
        form: the same in parts; None where the notation has ids of calls.
    """

    text: str
    probes: tuple[str, ...]
    schemas: tuple[str, ...]
    form: CallForm | None


@lru_cache(maxsize=64)
def write_grammar(
    marks: Marks, allowed: AllowedCalls, json_schema: str | None = None, choices: tuple[str, ...] = ()
) -> CallGrammar:
    """Return the grammar of an answer that may call tools.

    Args:
        json_schema: of an answer without a call; None for any text.
        choices: the only answers without a call; empty for any.

    Raises:
        SchemaUnsupported: a schema is no object, or an answer by `json_schema` could be taken for a call.
    """
    writer = _Writer(marks, allowed.is_parallel)
    tools = allowed.callable_tools
    if tools:
        writer.add_calls(tools)
    writer.add_start(allowed.mode, json_schema, choices)
    schemas = tuple(json.dumps(read_schema(tool)) for tool in tools)
    has_ids = marks.calls.id_key is not None
    form = None if has_ids else writer.describe(allowed.mode, tools, schemas, json_schema, choices)
    return CallGrammar("\n".join(writer.rules) + "\n", writer.probes(tools), schemas, form)


class _Writer:
    """Writes the rules of one grammar."""

    def __init__(self, marks: Marks, is_parallel: bool) -> None:
        self._marks, self._format, self._is_parallel = marks, marks.calls, is_parallel
        self._ids = dict(marks.control)
        texts = sorted(self._ids, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, texts)) if texts else r"(?!)")
        self.rules: list[str] = []

    def add_start(self, mode: str, json_schema: str | None, choices: Sequence[str]) -> None:
        """Add the first rule, and those of an answer without a call."""
        thought = ""
        start, end = self._marks.thought_start.strip(), self._marks.thought_end.strip()
        tail = ""
        if end:
            thought = f"{self._literal(start)} {self._add_until('thought', end)} "
            tail = self._marks.thought_end[len(self._marks.thought_end.rstrip()) :]
        opener = self._format.opener.lstrip()
        lead = self._format.opener[: len(self._format.opener) - len(opener)]
        before = f"{self._literal(lead)}?" if lead else ""
        calls = " ".join(filter(None, (self._literal(tail), before, self._literal(opener), "calls")))
        if mode == "required":
            self.rules.insert(0, f"start: {thought}{calls}")
            return
        if json_schema is not None or choices:
            content = " ".join(filter(None, (self._literal(tail), self._add_content(json_schema, choices))))
            options = [content] if mode == "none" else [content, calls]
        else:
            options = ["plain"] if mode == "none" else ["plain", self._add_opened(calls)]
            self.rules.append(f"plain: PLAIN\nPLAIN: {self._plain_pattern()}")
        self.rules.insert(0, f"start: {thought}({' | '.join(options)})")

    def add_calls(self, tools: Sequence[Tool]) -> None:
        """Add the rules of the calls behind the opener."""
        found = self._format
        self.rules.append(f"call: {self._literal(self._common_prefix())} called")
        self.rules.append("called: " + " | ".join(f"tool{number}" for number in range(len(tools))))
        known: dict[str, str] = {}
        for number, tool in enumerate(tools):
            schema = set_whitespace(json.dumps(read_schema(tool)))
            if schema not in known:
                known[schema] = f"arguments{len(known)}"
                self.rules.append(f"{known[schema]}: %json {schema}")
            self.rules.append(f"tool{number}: {self._object_rest(tool.name, known[schema])}")
        more = f" ({self._literal(found.separator)} call){{0,{MAX_CALLS - 1}}}"
        several = more if self._is_parallel and found.separator else ""
        self.rules.append(f"calls: call{several} {self._literal(found.closer)}".rstrip())
        if found.id_key is not None:
            self.rules.append(f"id: ID\nID: /{ID_PATTERN}/")

    def probes(self, tools: Sequence[Tool]) -> tuple[str, ...]:
        """Return the beginning of a call of each tool, up to its arguments."""
        keys = [key for key, _ in self._format.keys]
        found = self._format
        if keys.index(found.arguments_key) < keys.index(found.name_key) or not tools:
            return ()
        begins = []
        for tool in tools:
            filled = _fill(self._format, json.dumps(tool.name), "\0", '"abcdefghi"').partition("\0")[0]
            begins.append(f"{self._marks.thought_start}{self._marks.thought_end}{found.opener}{filled}")
        return tuple(begins)

    def describe(
        self,
        mode: str,
        tools: Sequence[Tool],
        schemas: Sequence[str],
        json_schema: str | None,
        choices: tuple[str, ...],
    ) -> CallForm:
        """Return the same answers in parts, for a notation without ids."""
        found, marks = self._format, self._marks
        around = [_fill(self._format, json.dumps(tool.name), "\0", "").split("\0") for tool in tools]
        return CallForm(
            mode,
            (marks.thought_start.strip(), marks.thought_end) if marks.thought_end.strip() else None,
            found.opener.lstrip(),
            found.separator if self._is_parallel else "",
            found.closer,
            tuple((before, schema, after) for (before, after), schema in zip(around, schemas, strict=True)),
            found.text_separator is not None and bool(found.opener.strip()),
            json_schema,
            choices,
        )

    def _add_opened(self, calls: str) -> str:
        """Return the rule of calls, with text before them where the template writes such."""
        mark = self._format.opener.strip()
        if self._format.text_separator is None or not mark:
            return calls
        until = self._add_until("before", mark)
        tail = self._format.opener[len(self._format.opener.rstrip()) :]
        return " ".join(filter(None, (until, self._literal(tail), "calls")))

    def _add_content(self, json_schema: str | None, choices: Sequence[str]) -> str:
        if json_schema is None:
            self.rules.append("content: " + " | ".join(self._literal(choice) for choice in choices))
        elif not self._format.opener:
            raise SchemaUnsupported("the model's calls are JSON without a mark, as the answer would be")
        else:
            self.rules.append(f"content: %json {set_whitespace(json_schema)}")
        return "content"

    def _add_until(self, name: str, mark: str) -> str:
        """Add a rule of any text up to a mark, and the mark; return the rule."""
        first, *rest = self._split(mark)
        tail = " ".join(self._literal(part) for part in rest)
        # Lazy: it ends with the first mark.
        self.rules.append(f"{name}_mark[lazy]: /{_ANY}{_escape(first)}/")
        options = [f"{name}_mark"]
        if first in self._ids:
            self.rules.append(f"{name.upper()}: /[\\s\\S]+/ & ~/{_ANY}{_escape(first)}{_ANY}/")
            options.append(f"{name.upper()}? <[{self._ids[first]}]>")
        self.rules.append(f"{name}: ({' | '.join(options)}) {tail}".rstrip())
        return name

    def _plain_pattern(self) -> str:
        """Return the pattern of text that begins no call and no further thought."""
        pattern = f"/{_ANY}/"
        mark = self._format.opener.strip()
        if mark:
            for text in {mark, self._split(mark)[0]}:
                pattern += f" & ~/{_ANY}{_escape(text)}{_ANY}/"
        else:
            pattern += f" & ~/[{_BLANKS}]*{_escape('{' + self._key(0))}{_ANY}/"
        if end := self._marks.thought_end.strip():
            pattern += f" & ~/{_ANY}{_escape(end)}{_ANY}/"
        return pattern

    def _key(self, place: int) -> str:
        return f"{json.dumps(self._format.keys[place][0])}{self._format.colon}"

    def _common_prefix(self) -> str:
        """Return what all calls begin with, up to the first value of their own."""
        return re.split("[\0\1\2]", _fill(self._format, "\1", "\0", "\2"))[0]

    def _object_rest(self, name: str, arguments: str) -> str:
        """Return the rule of a call behind `_common_prefix`."""
        rest = _fill(self._format, json.dumps(name), "\0", "\2")[len(self._common_prefix()) :]
        items = [self._literal('"'), "id", self._literal('"')]
        slots = {"\0": [arguments], "\2": items}
        parts = (slots.get(part) or [self._literal(part)] for part in re.split("([\0\2])", rest) if part)
        return " ".join(item for part in parts for item in part)

    def _split(self, text: str) -> list[str]:
        """Return a text in pieces: added tokens, and what is between them."""
        return [part for part in re.split(f"({self._control.pattern})", text) if part]

    def _literal(self, text: str) -> str:
        """Return the items that match exactly this text, an added token also by its id."""
        items = []
        for part in self._split(text):
            quoted = json.dumps(part, ensure_ascii=False)
            items.append(f"(<[{self._ids[part]}]> | {quoted})" if part in self._ids else quoted)
        return " ".join(items)


def write_call(found: CallFormat, name: str, arguments: str, number: str) -> str:
    """Return the object of a call in a notation.

    Args:
        arguments: their JSON text.
        number: the id of the call, for a notation that has one.
    """
    return _fill(found, json.dumps(name), arguments, json.dumps(number))


def _fill(found: CallFormat, name: str, arguments: str, number: str) -> str:
    """Return the object of a call with these JSON texts as its values."""
    own = {found.name_key: name, found.arguments_key: arguments, found.id_key: number}
    values = [own[key] if key in own else json.dumps(fixed) for key, fixed in found.keys]
    pairs = zip(found.keys, values, strict=True)
    return "{" + found.comma.join(f"{json.dumps(key)}{found.colon}{value}" for (key, _), value in pairs) + "}"


def _escape(text: str) -> str:
    """Return a text as a pattern between slashes."""
    return "".join(char if char.isalnum() and char.isascii() else f"\\u{{{ord(char):x}}}" for char in text)
