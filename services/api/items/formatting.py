"""Responses in the format of OpenAI's Responses API, whole and streamed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from typing import Any

from services.answering.request import Delta, GenerationRequest
from services.api.items.schemas import ResponsesRequest
from services.api.items.writing import Event, ItemWriter
from services.errors import ApiError
from services.model_pool import LoadedModel
from stages.common.chat.template import encode_text


class ItemFormatter:
    """Formats the answer to one request; a whole response is what its stream ends with.

    Args:
        body: as it was sent; the response repeats what of it holds.
    """

    def __init__(self, body: ResponsesRequest, request: GenerationRequest, model: LoadedModel) -> None:
        self._request_id = request.request_id
        self._tokenizer = model.tokenizer
        self._writer = ItemWriter(request.request_id)
        self._sequence = 0
        self._last: Delta | None = None  # the one with the finish reason
        self._common: dict[str, Any] = {
            "id": request.request_id,
            "object": "response",
            "created_at": int(time.time()),
            "model": body.model or model.files.name,
            # The version that answered: equal seeds give equal answers only where this is equal.
            "system_fingerprint": model.files.version,
            **_repeat(body, request),
        }

    def format_opening(self, first: Delta, place: int = 0) -> bytes:
        """Return the events before the first item."""
        response = self._describe("in_progress")
        return self._write(
            [(f"response.{name}", {"response": response}) for name in ("created", "in_progress")]
        )

    def format_chunk(self, delta: Delta, place: int = 0) -> bytes:
        """Return the events of a piece of the answer."""
        return self._write(self._push(delta))

    def format_end(self) -> bytes:
        """Return the last event, with the whole response."""
        response = self._describe_whole()
        return self._write([(f"response.{response['status']}", {"response": response})])

    def format_error(self, error: ApiError) -> bytes:
        """Return the event that ends a stream early, with the items so far."""
        for _ in self._writer.finish("incomplete"):
            pass
        response = {**self._describe("failed"), "error": _describe_error(error)}
        return self._write([("response.failed", {"response": response})])

    def format_whole(self, answers: Sequence[Sequence[Delta]]) -> bytes:
        """Return the body of a response that is not streamed."""
        for delta in answers[0]:
            for _ in self._push(delta):
                pass
        return json.dumps(self._describe_whole(), ensure_ascii=False).encode()

    def _push(self, delta: Delta) -> Iterable[Event]:
        yield from self._writer.push(delta)
        if delta.finish_reason is not None:
            self._last = delta
            yield from self._writer.finish("incomplete" if delta.finish_reason == "length" else "completed")

    def _describe_whole(self) -> dict[str, Any]:
        assert self._last is not None
        is_cut = self._last.finish_reason == "length"
        response = self._describe("incomplete" if is_cut else "completed")
        if is_cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            response["completed_at"] = int(time.time())
        return {**response, "usage": self._describe_usage(self._last)}

    def _describe(self, status: str) -> dict[str, Any]:
        empty = {"error": None, "incomplete_details": None, "usage": None}
        return {**self._common, "status": status, **empty, "output": list(self._writer.items)}

    def _describe_usage(self, last: Delta) -> dict[str, Any]:
        """Return the usage; thoughts are counted by their text, so without the marks around them."""
        assert last.usage is not None
        prompt, completion = last.usage.prompt_tokens, last.usage.completion_tokens
        thoughts = self._writer.reasoning
        count = min(completion, len(encode_text(self._tokenizer, thoughts))) if thoughts else 0
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": completion,
            "output_tokens_details": {"reasoning_tokens": count},
            "total_tokens": prompt + completion,
        }

    def _write(self, events: Iterable[Event]) -> bytes:
        """Return events as they are sent, numbered."""
        lines = []
        for kind, fields in events:
            event = {"type": kind, "sequence_number": self._sequence, **fields}
            self._sequence += 1
            lines.append(f"event: {kind}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n")
        return "".join(lines).encode()


def _repeat(body: ResponsesRequest, request: GenerationRequest) -> dict[str, Any]:
    """Return the fields of a response that describe its request, with the values that hold."""
    sent = body.model_dump(mode="json", by_alias=True, include={"text", "tools", "tool_choice"})
    wanted = (sent["text"] or {}).get("format") or {"type": "text"}
    sampling = request.sampling
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": sampling.max_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": sampling.temperature,
        "text": {"format": _drop_missing(wanted)},
        "tool_choice": sent["tool_choice"] or "auto",
        "tools": sent["tools"] or [],
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _drop_missing(wanted: dict[str, Any]) -> dict[str, Any]:
    """Return a format with the fields that its type has."""
    kept = wanted if wanted["type"] == "json_schema" else {"type": wanted["type"]}
    return {name: value for name, value in kept.items() if value is not None}


def _describe_error(error: ApiError) -> dict[str, Any]:
    """Return an error with one of the codes that a failed response has."""
    code = "rate_limit_exceeded" if error.status == 429 else "server_error"
    return {"code": "invalid_prompt" if error.status < 429 else code, "message": error.message}
