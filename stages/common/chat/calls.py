"""Calls of tools as a model writes them: the notation is read from its chat template, not known by model.

The template is given a turn with a call of a made-up tool, and what it writes around name and arguments is
the notation. Most write a JSON object in some frame: Qwen and Hermes `<tool_call>{...}</tool_call>`, Mistral
a list behind `[TOOL_CALLS]`, Llama 3 the bare object.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from stages.common.chat.control_tokens import list_special_ids
from stages.common.chat.template import cut_reasoning, read_answer_frame, render_example, thinks
from stages.common.errors import InputError
from stages.common.messages import (
    Message,
    Tool,
    ToolCall,
    format_arguments,
    format_calls,
    format_malformed,
    is_malformed,
    read_calls,
    refuse_constant,
    refuse_repeated_keys,
)

_NAME, _OTHER_NAME, _TEXT = "perennialtool", "perennialother", "perennialtext"
_ARGUMENTS, _OTHER_ARGUMENTS = {"perennialkey": "perennialvalue"}, {"perennialcount": 17}
_QUESTION = Message("user", "a")
_TOOLS = tuple(
    Tool(
        json.dumps(
            {
                "type": "function",
                "function": {
                    "name": name,
                    "description": "b",
                    "parameters": {"type": "object", "properties": {key: {"type": "string"} for key in keys}},
                },
            }
        )
    )
    for name, keys in ((_NAME, _ARGUMENTS), (_OTHER_NAME, _OTHER_ARGUMENTS))
)


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How calls are written: `opener`, one JSON object for each call between `separator`s, `closer`.

    Attributes:
        name_key, arguments_key: the object's keys for the tool's name and its arguments.
        id_key: its key for the id of the call; None where ids are not written.
        keys: all its keys in order, with their fixed values, as `type` may have one.
        colon, comma: what is between a key and its value, and between two keys.
        text_separator: what is between the text of a turn and its calls; None: such a text is not written.
    """

    opener: str
    separator: str
    closer: str
    name_key: str
    arguments_key: str
    id_key: str | None
    keys: tuple[tuple[str, Any], ...]
    colon: str
    comma: str
    text_separator: str | None

    def is_opened(self, text: str) -> bool:
        """Return whether a text begins a call; without an opener, whether it begins as the object does."""
        start = self.opener or f"{{{json.dumps(self.keys[0][0])}{self.colon}"
        return start.strip() in text if self.opener else text.lstrip().startswith(start)

    def read(self, text: str) -> str:
        """Return what a model wrote as the text that is judged (`Message.answer`).

        Text without a call is itself; what begins a call and is none that is whole is `format_malformed`, as
        are calls with an escape of half a surrogate pair: no store or response can encode the character.
        """
        if not self.is_opened(text):
            # In our own notation, which is not the model's: no client is given that as a call.
            return format_malformed(text) if read_calls(text) or is_malformed(text) else text
        before, opener, rest = self._split(text)
        try:
            calls = self._read_calls(opener + rest)
            answer = format_calls(before.strip() if calls else text, calls)
            answer.encode()
        except (ValueError, RecursionError, TypeError):
            return format_malformed(text)
        return answer

    def _split(self, text: str) -> tuple[str, str, str]:
        return text.partition(self.opener.strip()) if self.opener.strip() else ("", "", text)

    def _read_calls(self, text: str) -> list[ToolCall]:
        """Return the calls of a text that begins with the opener; a ValueError if it is anything else."""
        decoder = json.JSONDecoder(object_pairs_hook=refuse_repeated_keys, parse_constant=refuse_constant)
        calls: list[ToolCall] = []
        place = len(self.opener.strip())
        separator, closer = self.separator.strip(), self.closer.strip()
        while True:
            place += len(text[place:]) - len(text[place:].lstrip())
            value, place = decoder.raw_decode(text, place)
            calls.append(self._read_call(value))
            rest = text[place:].strip()
            if rest == closer:
                return calls
            if not separator or not rest.startswith(separator):
                raise ValueError("what follows the call is neither another one nor its end")
            place = text.index(separator, place) + len(separator)

    def _read_call(self, value: Any) -> ToolCall:
        if not isinstance(value, dict) or not {self.name_key, self.arguments_key} <= set(value):
            raise ValueError("no name or no arguments")
        name, arguments = value[self.name_key], value[self.arguments_key]
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise ValueError("the name is no text, or the arguments are no object")
        return ToolCall(name, format_arguments(arguments))


_formats: WeakKeyDictionary[Any, tuple[str, CallFormat]] = WeakKeyDictionary()


def read_call_format(tokenizer: Any) -> CallFormat:
    """Return how the tokenizer's chat template writes calls.

    Raises:
        InputError: it writes no tools, no calls, no results, or calls that are no JSON objects.
    """
    template = str(tokenizer.chat_template)
    if tokenizer not in _formats or _formats[tokenizer][0] != template:
        _formats[tokenizer] = (template, _read_call_format(tokenizer))
    return _formats[tokenizer][1]


def read_answer(tokenizer: Any, ids: Sequence[int], has_tools: bool) -> str:
    """Return what a model wrote, without its thoughts, as the text that is judged (`Message.answer`).

    Args:
        ids: what it wrote, without its end of turn.
        has_tools: whether it may call tools; if not, all that it wrote is text.
    """
    shown = find_shown_ids(tokenizer, has_tools)
    hidden = list_special_ids(tokenizer) - shown
    kept = [token for token in ids if token not in hidden]
    text = tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    text = cut_reasoning(tokenizer, text)
    return read_call_format(tokenizer).read(text) if has_tools else text


def find_shown_ids(tokenizer: Any, has_tools: bool) -> frozenset[int]:
    """Return the special tokens that are read as text, because thoughts and calls are known by them."""
    if not tokenizer.chat_template:
        return frozenset()
    marks = ""
    if thinks(tokenizer):
        frame = read_answer_frame(tokenizer)
        marks = frame.thought_start + (frame.thought_end or "")
    if has_tools:
        found = read_call_format(tokenizer)
        marks += found.opener + found.separator + found.closer
    added, special = tokenizer.added_tokens_decoder, list_special_ids(tokenizer)
    return frozenset(
        number
        for number, token in added.items()
        if number in special and token.content.strip() and token.content in marks
    )


def find_template_gap(tokenizer: Any) -> str | None:
    """Return what the chat template lacks for conversations with tools, or None."""
    try:
        read_call_format(tokenizer)
    except InputError as error:
        return error.what
    return None


def _read_call_format(tokenizer: Any) -> CallFormat:
    one = ToolCall(_NAME, format_arguments(_ARGUMENTS))
    two = ToolCall(_OTHER_NAME, format_arguments(_OTHER_ARGUMENTS))
    prompt, single = render_example(tokenizer, [_QUESTION, Message("assistant", "", (one,))], _TOOLS)
    if _NAME not in prompt or _OTHER_NAME not in prompt:
        raise _lacks("does not write the tools")
    single = cut_reasoning(tokenizer, single)  # a turn without thoughts may have an empty block of them
    opener, first, closer = _find_object(single)
    call_turn = Message("assistant", "", (one,))
    result = Message("tool", _TEXT)
    after, _ = render_example(tokenizer, [_QUESTION, call_turn, result, Message("assistant", "c")], _TOOLS)
    if _TEXT not in after or _NAME not in after[len(prompt) :]:
        raise _lacks("drops calls of tools or their results")
    keys = json.loads(first)
    names = [key for key, value in keys.items() if value == _NAME]
    arguments = [key for key, value in keys.items() if value == _ARGUMENTS]
    ids = [key for key, value in keys.items() if value == "call00001"]
    if len(names) != 1 or len(arguments) != 1:
        raise _lacks("writes a call that is not a JSON object of a name and arguments")
    return CallFormat(
        opener,
        _find_separator(tokenizer, one, two, opener, first, closer),
        closer,
        names[0],
        arguments[0],
        ids[0] if ids else None,
        tuple((key, None if key in (*names, *arguments, *ids) else value) for key, value in keys.items()),
        ": " if '": ' in first else ":",
        ", " if '", "' in first.replace(json.dumps(_ARGUMENTS), "{}") or ", " in first else ",",
        _find_text_separator(tokenizer, one, single),
    )


def _find_object(text: str) -> tuple[str, str, str]:
    """Return what is before, in and behind the one JSON object with the probe's name in a text."""
    decoder = json.JSONDecoder()
    start = text.find("{")
    while 0 <= start < text.find(_NAME):
        try:
            value, end = decoder.raw_decode(text, start)
        except ValueError:
            value = None
        if isinstance(value, dict) and _NAME in value.values():
            return text[:start], text[start:end], text[end:]
        start = text.find("{", start + 1)
    raise _lacks(
        "writes calls of tools in another form than JSON objects" if _NAME in text else "writes no calls"
    )


def _find_separator(
    tokenizer: Any, one: ToolCall, two: ToolCall, opener: str, first: str, closer: str
) -> str:
    """Return what is between two calls; "" where the template writes one call a turn only."""
    try:
        _, both = render_example(tokenizer, [_QUESTION, Message("assistant", "", (one, two))], _TOOLS)
    except InputError:
        return ""  # Llama 3 refuses more than one
    both = cut_reasoning(tokenizer, both)
    if not both.startswith(opener + first) or not both.endswith(closer) or _OTHER_NAME not in both:
        raise _lacks("writes two calls in another form than one")
    rest = both[len(opener + first) : len(both) - len(closer)]
    return rest[: rest.index("{")]


def _find_text_separator(tokenizer: Any, one: ToolCall, single: str) -> str | None:
    _, text = render_example(tokenizer, [_QUESTION, Message("assistant", _TEXT, (one,))], _TOOLS)
    text = cut_reasoning(tokenizer, text).lstrip()  # before an answer Mistral writes a space
    if not text.startswith(_TEXT) or not text.endswith(single.lstrip()):
        return None
    return text[len(_TEXT) : len(text) - len(single.lstrip())]


def _lacks(what: str) -> InputError:
    return InputError(
        f"the base model's chat template {what}",
        "set task.tools_template: default, or choose a base model that was trained to call tools",
    )
