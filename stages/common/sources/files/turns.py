"""Turns of a conversation, as OpenAI, ShareGPT, Hermes and Hugging Face write them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from stages.common.messages import Message, ToolCall
from stages.common.sources.files.entries import BadRow, shorten
from stages.common.sources.files.strict_json import decode_json, encode_json, read_list
from stages.common.sources.files.tools.calls import read_calls, read_id
from stages.common.sources.files.tools.hermes import decode_call, split_results, take_calls

# ShareGPT's names, OpenAI's, and those of their relatives, in small letters, with _ for blanks and hyphens.
ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",  # OpenAI's older name
    "observation": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "function_response": "tool",
    "ipython": "tool",  # Llama's name
    "function_call": "calls",  # an assistant's turn whose text is its calls, as JSON or a literal of Python
    "tool_call": "calls",
}
TOOL_KEYS = ("tool_calls", "function_call")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # of servers, by how common they are
# OpenAI's, LLaMA-Factory's, axolotl's (two), ms-swift's.
WEIGHT_KEYS = ("weight", "loss_weight", "train", "training", "loss")
READ_KEYS = frozenset(
    {"role", "from", "content", "value", "refusal", "tool_call_id", *TOOL_KEYS, *REASONING_KEYS, *WEIGHT_KEYS}
)
THOUGHTS = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
# What is done with turns, besides the forms of tools, and counted in the report by rows.
CUT = "turns after the last answer to learn, left out"
REFUSAL = "refusals, read as the text of the answer"
THOUGHTS_MOVED = "thoughts before answers (<think>), read as reasoning_content"
THOUGHTS_WITHIN = "<think> within answers, learned as text"
TEXT_JOINED = "texts of the turns before calls, read as those of one turn"
MEDIA_KINDS = ("image", "image_url", "input_image", "audio", "input_audio", "video", "file")


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn, and whether its author wants it to be learned (`WEIGHT_KEYS`)."""

    message: Message
    is_learned: bool = True


def parse_list(value: Any) -> list[Any]:
    """Return a list of turns, which may be in a cell as JSON.

    Raises:
        BadRow: it is neither a list nor the JSON of one.
    """
    if isinstance(value, str):
        try:
            value = decode_json(value)
        except ValueError as error:
            raise BadRow("wrong_messages", f"not JSON: {error}") from None
    if not isinstance(value, list):
        raise BadRow("wrong_messages", f"a {type(value).__name__} instead of a list")
    return value


def parse_turns(value: Any, forms: set[str]) -> list[Turn]:
    """Return the turns of a conversation; calls are one turn with those before them, and with a text.

    Args:
        forms: where the forms in which tools are written are added.

    Raises:
        BadRow: a turn has no role or content, an unknown role, or a call that cannot be read.
    """
    turns: list[Turn] = []
    is_call = False
    for place, turn in enumerate(parse_list(value), start=1):
        role = _read_role(turn, place)
        found = list(_parse_turn(turn, role, place, forms))
        if role == "calls" and turns and (is_call or _announces(turns[-1].message, found[0].message)):
            if not is_call:
                forms.add(TEXT_JOINED)
            found = [_join_calls(turns.pop(), found[0])]
        turns += found
        is_call = role == "calls"
    return turns


def _announces(before: Message, calls: Message) -> bool:
    """Return whether a turn is the text of the one that calls: the model must not learn to stop behind it."""
    return before.role == "assistant" and not before.tool_calls and before.is_learned == calls.is_learned


def _join_calls(first: Turn, second: Turn) -> Turn:
    before, after = first.message, second.message
    thoughts = "\n\n".join(filter(None, (before.reasoning, after.reasoning))) or None
    calls = (*before.tool_calls, *after.tool_calls)
    whole = replace(after, content=before.content, tool_calls=calls, reasoning=thoughts)
    return replace(second, message=whole)


def find_answer(turns: list[Turn], forms: set[str]) -> list[Message]:
    """Return the messages up to the last answer to learn: logs go on with a question, or a bad answer.

    Args:
        forms: where it is noted that turns are left out.

    Raises:
        BadRow: every answer has the weight 0.
    """
    messages = [turn.message for turn in turns]
    answers = [n for n, message in enumerate(messages) if message.role == "assistant"]
    learned = [n for n in answers if turns[n].is_learned]
    if not learned:
        if answers:
            raise BadRow("weight_zero", "every answer has the weight 0: it is not to be learned")
        return messages
    end = learned[-1] + 1
    if end < len(messages):
        forms.add(CUT)
    return messages[:end]


def take_thoughts(content: str, forms: set[str]) -> tuple[str, str | None]:
    """Return an answer without the thoughts at its beginning, and these; None where there are none."""
    found = THOUGHTS.match(content)
    rest = content[found.end() :] if found else content
    if "<think>" in rest or "</think>" in rest:
        forms.add(THOUGHTS_WITHIN)
    if not found:
        return content, None
    forms.add(THOUGHTS_MOVED)
    return rest, found[1].strip() or None


def find_unread_keys(value: Any) -> set[str]:
    """Return the keys of turns that have a value and are not read; none of a value that is no list of turns.

    The name in a tool's result repeats what the call has.
    """
    found: set[str] = set()
    for turn in read_list(value) or ():
        if _is_turn(turn):
            read = {*READ_KEYS, "name"} if ROLES.get(_name_role(turn)) == "tool" else READ_KEYS
            found |= {str(key) for key in turn if key not in read and turn[key] not in (None, "", [], {})}
    return found


def _read_role(turn: Any, place: int) -> str:
    """Return what a turn is: one of the values of `ROLES`."""
    role = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
    if role is None:
        raise BadRow("wrong_messages", f"message {place} has no role and content: {shorten(turn)}")
    known = ROLES.get(_name_role(turn))
    if known is None:
        raise BadRow(
            "wrong_messages", f"unknown role {role!r} of message {place} (known: {', '.join(ROLES)})"
        )
    return known


def _name_role(turn: Mapping[str, Any]) -> str:
    return re.sub(r"[\s-]+", "_", str(turn.get("role", turn.get("from"))).strip().lower())


def _parse_turn(turn: Mapping[str, Any], role: str, place: int, forms: set[str]) -> Iterator[Turn]:
    """Yield the turn: several where one has several results."""
    where = f"message {place}"
    calls = _read_calls(turn, role, where, forms)
    if not calls and not {"content", "value", "refusal"} & turn.keys():
        raise BadRow("wrong_messages", f"{where} has no role and content: {shorten(turn)}")
    content = _read_content(turn, role, where, bool(calls))
    if content is None:
        content = _read_refusal(turn, role, where, forms)
    is_learned = _read_weight(turn, place)
    if role == "calls":
        forms.add("turns of the role function_call")
        content, reasoning = _take_reasoning(turn, content, where, forms)
        if isinstance(content, str):
            content = decode_call(content.strip(), where)
        calls = read_calls(content, where)
        message = Message("assistant", "", calls, reasoning=reasoning, is_learned=is_learned)
        yield Turn(message, is_learned is not False)
        return
    if role == "tool" or (role == "user" and "<tool_response>" in content):
        results = split_results(content)
        if role == "tool" or results:
            id = read_id(turn.get("tool_call_id"), where)
            for result in results or [content]:
                yield Turn(Message("tool", result, tool_call_id=id), is_learned is not False)
            return
    if _name_role(turn) == "developer":
        forms.add("the role developer, read as system")
    message = Message(role, content)
    if role == "assistant":
        content, reasoning = _take_reasoning(turn, content, where, forms)
        if not calls:
            content, calls = take_calls(content, where, forms)
        if is_learned is not None:
            forms.add("weights of answers")
        message = Message(role, content, calls, reasoning=reasoning, is_learned=is_learned)
    yield Turn(message, is_learned is not False)


def _read_calls(turn: Mapping[str, Any], role: str, where: str, forms: set[str]) -> tuple[ToolCall, ...]:
    """Return the calls under a turn's own keys."""
    key = next((key for key in TOOL_KEYS if turn.get(key)), None)
    if key is None:
        return ()
    if role != "assistant":
        raise BadRow("wrong_call", f"{where} has {key} and is not the assistant's")
    forms.add("tool_calls" if key == "tool_calls" else "function_call, the older form of tool_calls")
    return read_calls(turn[key], where)


def _read_content(turn: Mapping[str, Any], role: str, where: str, has_calls: bool) -> Any:
    """Return the text of a turn, None where it is null; a value that is no text only of the role calls."""
    content = next((turn[key] for key in ("content", "value") if key in turn), None)
    if role == "calls" or (content is None and (has_calls or role == "tool")):
        return "" if content is None else content
    if role == "tool" and isinstance(content, Mapping | list) and not _has_parts(content):
        try:
            return encode_json(content)
        except ValueError as error:
            raise BadRow("wrong_messages", f"the content of {where}: {error}") from None
    return None if content is None else _parse_content(content, where)


def _read_refusal(turn: Mapping[str, Any], role: str, where: str, forms: set[str]) -> str:
    """Return what the assistant wrote in place of an answer, as OpenAI's API has it."""
    refusal = turn.get("refusal")
    if role != "assistant" or not isinstance(refusal, str) or not refusal.strip():
        raise BadRow("wrong_messages", f"the content of {where} is null, and it has no text in its place")
    forms.add(REFUSAL)
    return refusal


def _has_parts(content: Any) -> bool:
    """Return whether a list has parts of text, or media, which are refused."""
    return isinstance(content, list) and any(
        isinstance(part, Mapping) and part.get("type") in ("text", *MEDIA_KINDS) for part in content
    )


def _parse_content(content: Any, where: str) -> str:
    """Return a text, or the texts of a list of parts."""
    if isinstance(content, list) and content and all(isinstance(part, Mapping) for part in content):
        kinds = {str(part.get("type")) for part in content}
        texts = [part.get("text", part.get("value")) for part in content]
        if kinds == {"text"} and all(isinstance(text, str) for text in texts):
            return "".join(texts)
        raise BadRow("not_text", f"{where} has parts of the type {', '.join(sorted(kinds))}")
    if not isinstance(content, str):
        raise BadRow("wrong_messages", f"the content of {where} is a {type(content).__name__}")
    return content


def _take_reasoning(
    turn: Mapping[str, Any], content: Any, where: str, forms: set[str]
) -> tuple[Any, str | None]:
    """Return the content of an answer without its thoughts, and these: of their own key, or in the text."""
    if reasoning := _read_reasoning(turn, where):
        forms.add("reasoning")
        return content, reasoning
    return take_thoughts(content, forms) if isinstance(content, str) else (content, None)


def _read_reasoning(turn: Mapping[str, Any], where: str) -> str | None:
    found = next((turn[key] for key in REASONING_KEYS if turn.get(key) not in (None, "")), None)
    if found is not None and not isinstance(found, str):
        raise BadRow("wrong_messages", f"the reasoning of {where} is a {type(found).__name__}")
    return found


def _read_weight(turn: Mapping[str, Any], place: int) -> bool | None:
    """Return whether a turn is to be learned; None where it does not mention it."""
    weights = {key: turn[key] for key in WEIGHT_KEYS if turn.get(key) is not None}
    for key, weight in weights.items():
        if weight not in (0, 1):
            raise BadRow("wrong_messages", f"the {key} of message {place} is {shorten(weight)}, not 0 or 1")
    if len(found := {bool(weight) for weight in weights.values()}) > 1:
        raise BadRow("wrong_messages", f"{' and '.join(weights)} of message {place} contradict each other")
    return found.pop() if found else None


def is_conversation(value: Any) -> bool:
    """Return whether a value is a list of turns, or its JSON."""
    return all(map(_is_turn, turns)) if (turns := read_list(value)) else False


def _is_turn(turn: Any) -> bool:
    return (
        isinstance(turn, Mapping)
        and ("role" in turn or "from" in turn)
        and ({"content", "value", "refusal", *TOOL_KEYS} & turn.keys() != set())
    )
