"""Turns of a conversation, as OpenAI, ShareGPT, Hermes and Hugging Face write them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from stages.common.messages import Message, ToolCall
from stages.common.sources.files.entries import BadRow, shorten
from stages.common.sources.files.strict_json import decode_json, encode_json, read_list
from stages.common.sources.files.tools.calls import read_calls, read_id
from stages.common.sources.files.tools.hermes import split_results, take_calls

# ShareGPT's names, OpenAI's, and those of their relatives; compared in small letters.
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
    "function_call": "calls",  # an assistant's turn whose text is the JSON of its calls
    "tool_call": "calls",
}
TOOL_KEYS = ("tool_calls", "function_call")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # of servers, by how common they are
WEIGHT_KEYS = ("weight", "loss_weight", "train")  # OpenAI's, LLaMA-Factory's, axolotl's
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
    """Return the turns of a conversation; calls that follow each other are one turn.

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
        if role == "calls" and is_call:
            found = [_join_calls(turns.pop(), found[0])]
        turns += found
        is_call = role == "calls"
    return turns


def _join_calls(first: Turn, second: Turn) -> Turn:
    calls = (*first.message.tool_calls, *second.message.tool_calls)
    return replace(second, message=replace(second.message, tool_calls=calls))


def find_answer(turns: list[Turn]) -> list[Message]:
    """Return the messages up to the last answer to learn: later turns of weight 0 are excluded.

    Raises:
        BadRow: every answer has the weight 0.
    """
    messages = [turn.message for turn in turns]
    if not turns or turns[-1].is_learned:
        return messages
    learned = [n for n, turn in enumerate(turns) if turn.message.role == "assistant" and turn.is_learned]
    if not learned:
        raise BadRow("weight_zero", "every answer has the weight 0: it is not to be learned")
    return messages[: learned[-1] + 1]


def _read_role(turn: Any, place: int) -> str:
    """Return what a turn is: one of the values of `ROLES`."""
    role = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
    if role is None:
        raise BadRow("wrong_messages", f"message {place} has no role and content: {shorten(turn)}")
    known = ROLES.get(str(role).strip().lower())
    if known is None:
        raise BadRow(
            "wrong_messages", f"unknown role {role!r} of message {place} (known: {', '.join(ROLES)})"
        )
    return known


def _parse_turn(turn: Mapping[str, Any], role: str, place: int, forms: set[str]) -> Iterator[Turn]:
    """Yield the turn: several where one has several results."""
    where = f"message {place}"
    calls = _read_calls(turn, role, where, forms)
    if not calls and not {"content", "value"} & turn.keys():
        raise BadRow("wrong_messages", f"{where} has no role and content: {shorten(turn)}")
    content = _read_content(turn, role, where, bool(calls))
    is_learned = _read_weight(turn, place)
    if role == "calls":
        forms.add("turns of the role function_call")
        message = Message("assistant", "", read_calls(content, where), is_learned=is_learned)
        yield Turn(message, is_learned is not False)
        return
    if role == "tool" or (role == "user" and "<tool_response>" in content):
        results = split_results(content)
        if role == "tool" or results:
            id = read_id(turn.get("tool_call_id"), where)
            for result in results or [content]:
                yield Turn(Message("tool", result, tool_call_id=id), is_learned is not False)
            return
    if str(turn.get("role", turn.get("from"))).strip().lower() == "developer":
        forms.add("the role developer, read as system")
    message = Message(role, content)
    if role == "assistant":
        if not calls:
            content, calls = take_calls(content, where, forms)
        reasoning = _read_reasoning(turn, where)
        if reasoning:
            forms.add("reasoning")
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
    """Return the text of a turn; a value that is not a text only of the role calls."""
    content = next((turn[key] for key in ("content", "value") if key in turn), None)
    if role == "calls" or (content is None and (has_calls or role == "tool")):
        return "" if content is None else content
    if role == "tool" and isinstance(content, Mapping | list) and not _has_parts(content):
        try:
            return encode_json(content)
        except ValueError as error:
            raise BadRow("wrong_messages", f"the content of {where}: {error}") from None
    return _parse_content(content, where)


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


def _read_reasoning(turn: Mapping[str, Any], where: str) -> str | None:
    found = next((turn[key] for key in REASONING_KEYS if turn.get(key) not in (None, "")), None)
    if found is not None and not isinstance(found, str):
        raise BadRow("wrong_messages", f"the reasoning of {where} is a {type(found).__name__}")
    return found


def _read_weight(turn: Mapping[str, Any], place: int) -> bool | None:
    """Return whether a turn is to be learned; None where it does not mention it."""
    weight = next((turn[key] for key in WEIGHT_KEYS if turn.get(key) is not None), None)
    if weight not in (None, 0, 1):
        raise BadRow("wrong_messages", f"the weight of message {place} is {shorten(weight)}, not 0 or 1")
    return None if weight is None else bool(weight)


def is_conversation(value: Any) -> bool:
    """Return whether a value is a list of turns, or its JSON."""
    return all(map(_is_turn, turns)) if (turns := read_list(value)) else False


def _is_turn(turn: Any) -> bool:
    return (
        isinstance(turn, Mapping)
        and ("role" in turn or "from" in turn)
        and ({"content", "value", *TOOL_KEYS} & turn.keys() != set())
    )
