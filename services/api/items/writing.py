"""The items of an answer, each step as an event of OpenAI's Responses API."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from services.answering.request import Delta
from services.engines.calls.reading import CallPiece

Event = tuple[str, dict[str, Any]]  # its type and fields
Status = Literal["in_progress", "completed", "incomplete"]
_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


class ItemWriter:
    """Puts the items of one answer together: thoughts, text and calls, each complete before the next.

    Args:
        request_id: the ids of the items are made of it.
    """

    def __init__(self, request_id: str) -> None:
        self._suffix = request_id.removeprefix("req_")
        self._pieces: list[str] = []  # of the text or the arguments of the last item
        self._is_open = False
        self.items: list[dict[str, Any]] = []

    def push(self, delta: Delta) -> Iterator[Event]:
        """Add a piece of the answer; yield the events of it."""
        if delta.reasoning:
            yield from self._write_text("reasoning", delta.reasoning)
        if delta.text:
            yield from self._write_text("message", delta.text)
        for call in delta.calls:
            yield from self._write_call(call)

    def finish(self, status: Status) -> Iterator[Event]:
        """End the answer; yield the events of the last item. An answer of nothing is an empty text."""
        if not self.items:
            yield from self._open("message", {"role": "assistant", "content": []})
        yield from self._close(status)

    @property
    def reasoning(self) -> str:
        """The thoughts of the items that are complete."""
        thoughts = [item["content"] for item in self.items if item["type"] == "reasoning"]
        return "".join(part["text"] for parts in thoughts for part in parts)

    def _write_text(self, kind: str, text: str) -> Iterator[Event]:
        if not self._is_open or self.items[-1]["type"] != kind:
            yield from self._close("completed")
            own: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
            yield from self._open(kind, {**own, "content": []})
        self._pieces.append(text)
        yield f"response.{_PARTS[kind]}.delta", {**self._text_place(), "delta": text}

    def _write_call(self, call: CallPiece) -> Iterator[Event]:
        if call.id is not None:
            yield from self._close("completed")
            own = {"call_id": call.id, "name": call.name, "arguments": ""}
            yield from self._open("function_call", own)
        if call.arguments:
            self._pieces.append(call.arguments)
            yield "response.function_call_arguments.delta", {**self._place(), "delta": call.arguments}

    def _open(self, kind: str, own: dict[str, Any]) -> Iterator[Event]:
        name = f"{_PREFIXES[kind]}_{self._suffix}_{len(self.items)}"
        item = {"id": name, "type": kind, "status": "in_progress", **own}
        self.items.append(item)
        self._pieces, self._is_open = [], True
        yield "response.output_item.added", {"output_index": len(self.items) - 1, "item": dict(item)}
        if kind in _PARTS:
            place = {**self._place(), "content_index": 0}
            yield "response.content_part.added", {**place, "part": _make_part(kind, "")}

    def _close(self, status: Status) -> Iterator[Event]:
        """End the open item; a call that may have been cut has no event with its whole arguments."""
        if not self._is_open:
            return
        self._is_open = False
        item, whole = self.items[-1], "".join(self._pieces)
        kind = item["type"]
        item["status"] = status
        if kind in _PARTS:
            part = _make_part(kind, whole)
            item["content"] = [part]
            yield f"response.{_PARTS[kind]}.done", {**self._text_place(), "text": whole}
            yield "response.content_part.done", {**self._place(), "content_index": 0, "part": part}
        else:
            item["arguments"] = whole
            if status == "completed":
                yield "response.function_call_arguments.done", {**self._place(), "arguments": whole}
        yield "response.output_item.done", {"output_index": len(self.items) - 1, "item": item}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _text_place(self) -> dict[str, Any]:
        place = {**self._place(), "content_index": 0}
        return {**place, "logprobs": []} if self.items[-1]["type"] == "message" else place


def _make_part(kind: str, text: str) -> dict[str, Any]:
    part: dict[str, Any] = {"type": _PARTS[kind], "text": text}
    return {**part, "annotations": [], "logprobs": []} if kind == "message" else part
